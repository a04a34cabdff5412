"""The text side of a checkpoint's files: what is in them, whatever that is."""
