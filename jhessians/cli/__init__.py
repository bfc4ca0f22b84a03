"""The command line: parsers, help, what reaches the terminal, exit codes."""
