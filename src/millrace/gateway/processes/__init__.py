"""The gateway's worker processes, and how they share a port."""
