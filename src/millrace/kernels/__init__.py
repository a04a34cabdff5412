"""The ops that the model is made of: each a short torch reference, and a fast path where it pays.

An op knows tensors and the records of `millrace.kernels.batch`; it knows no layer and no request.
CPU tensors run the reference, CUDA tensors the function of the same name in `kernels.gpu`.
"""
