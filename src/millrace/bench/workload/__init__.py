"""What is sent: prompts and output lengths, generated or read from files."""
