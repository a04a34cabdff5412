"""Work on clients' data in disposable processes, where a crash costs one request only."""
