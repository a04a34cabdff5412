"""Thousands of replicas at once: each step of all that are due is computed by arrays."""
