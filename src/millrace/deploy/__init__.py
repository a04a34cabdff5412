"""Fleets on clusters and machines: rendered from one file, checked, followed."""
