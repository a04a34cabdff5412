"""How a plan runs on a device: memory, slots, the step itself, ranks."""
