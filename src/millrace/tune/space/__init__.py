"""What can be chosen: knobs, their values, and which values fail together."""
