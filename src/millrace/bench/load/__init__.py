"""The load generator: arrivals, connections, load processes, records."""
