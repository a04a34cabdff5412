"""Bytes between clients and replicas, one exchange for each request."""
