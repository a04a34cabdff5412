"""Checks of a machine before it serves: each module checks one thing and reports on it."""
