"""Servers of trials: their command lines, loads on them, and what limits them."""
