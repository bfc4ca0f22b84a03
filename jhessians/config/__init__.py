"""What an option is, the tables of options, and the record that replays a run."""
