"""Tiers below the device: the host's memory, and files."""
