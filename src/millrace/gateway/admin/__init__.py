"""The administration API, the metrics and the status table."""
