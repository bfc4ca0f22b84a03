"""One file per subcommand: options in, library calls, summary out."""
