"""What a finished run tells its user."""
