"""Used in all of the gateway: limits, the clock, and counters that its processes share."""
