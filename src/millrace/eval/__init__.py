"""Accuracy: seeded tasks with known answers, how a model is asked them, and how two runs compare.

Nothing here imports PyTorch; a model is reached over HTTP or through `millrace.LLM`.
"""
