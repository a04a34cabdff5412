"""The parts of a report: each makes the steps that measure it."""
