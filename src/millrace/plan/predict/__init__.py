"""From steps to what users see: throughput, latency, cost, capacity, and the best settings."""
