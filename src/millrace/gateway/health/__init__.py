"""Which replicas there are and which of them are healthy."""
