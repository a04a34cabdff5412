"""What a user may choose; nothing heavy is imported here, so that `--help` is quick."""
