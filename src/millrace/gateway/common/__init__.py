"""Used in all of the gateway: limits, and counters that its processes share."""
