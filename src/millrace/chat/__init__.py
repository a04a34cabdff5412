"""A chat in the terminal, with a running server or with one that is started for it."""
