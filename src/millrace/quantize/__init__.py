"""Quantized checkpoints from plain ones: `millrace quantize`."""
