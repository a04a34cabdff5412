"""Which replica gets a request: the replicas, their load, the policies."""
