"""What both modes of the simulator share: options, the clock, the life of replicas, outcomes."""
