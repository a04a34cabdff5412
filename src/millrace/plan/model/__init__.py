"""The time and the energy of a step, memory, and how their parameters are fitted."""
