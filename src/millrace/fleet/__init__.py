"""Running several replicas on one host; each is known by its command line and its HTTP API."""
