"""Batches: many requests from a file, each answered exactly once, whatever is killed meanwhile."""
