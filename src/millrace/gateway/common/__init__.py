"""What all of the gateway uses: limits, and counters that its processes share."""
