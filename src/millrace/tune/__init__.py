"""Finds the settings of a server that serve a load best, by trials that can be resumed."""
