"""What programs write while they start and run: the format of lines, and words that several use."""
