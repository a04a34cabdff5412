"""Measures which ways of the kernels are fastest on this GPU, and writes the table of them."""
