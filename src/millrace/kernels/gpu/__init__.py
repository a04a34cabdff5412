"""Fast paths of the ops for CUDA tensors, in Triton, and fused forms of neighbouring ops.

Each module carries the name of the module of references beside this package, which says what an
op means; here stands how it is done. Nothing here is imported where there is no GPU.
"""
