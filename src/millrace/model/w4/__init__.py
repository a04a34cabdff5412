"""Weights of 4 bits: how checkpoints store them, which layers have them, and their linear layer."""
