"""The models: straight-line PyTorch modules over the ops in `millrace.kernels`."""
