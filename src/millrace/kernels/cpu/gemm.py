"""GEMMs with weights on a CPU that multiplies bfloat16.

The result of a row does not depend on other rows. With very many rows torch's GEMM is faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.kernels.cpu.call import function, pointer, threads
from millrace.kernels.cpu.w4 import w4_linear

__all__ = ["linear", "w4_linear"]

TORCH_IS_FASTER = 512  # from so many rows on
INPUT_MULTIPLE = 32  # the number of inputs must be a multiple of this


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As the reference, in bfloat16."""
    run, (columns, n) = function("linear"), weight.shape
    if (
        run is None
        or x.dtype != torch.bfloat16
        or x.shape[0] >= TORCH_IS_FASTER
        or n % INPUT_MULTIPLE
    ):
        return NotImplemented
    if weight.dtype != x.dtype or not (x.is_contiguous() and weight.is_contiguous()):
        return NotImplemented
    out = x.new_empty(x.shape[0], columns)
    done = run(pointer(x), pointer(weight), x.shape[0], columns, n, pointer(out), threads())
    return out if done else NotImplemented
