"""A conversation in the terminal, with a server that runs or one started for it."""
