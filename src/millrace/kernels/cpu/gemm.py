"""GEMMs with weights on a CPU that multiplies bfloat16, and those that are batch invariant on any.

The result of a row does not depend on other rows. With very many rows torch's GEMM is faster; its
results do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.kernels.cpu.call import DTYPES, function, is_bf16, pointer, threads
from millrace.kernels.cpu.w4 import w4_linear
from millrace.kernels.dispatch import is_invariant

__all__ = ["linear", "w4_linear"]

TORCH_IS_FASTER = 512  # from so many rows on
INPUT_MULTIPLE = 32  # the number of inputs must be a multiple of this
FLOATS_MULTIPLE = 16  # the same where sums are of float32 products


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As the reference, in bfloat16; where ops are to be invariant, in float32, too."""
    fixed, many = is_invariant(), x.shape[0] >= TORCH_IS_FASTER
    if weight.dtype != x.dtype or not weight.is_contiguous() or not (fixed or x.is_contiguous()):
        return NotImplemented
    out: Tensor = NotImplemented
    if x.dtype == torch.bfloat16 and (fixed or not many):
        out = _in_pairs(x.contiguous(), weight)
    return _in_floats(x.contiguous(), weight) if fixed and out is NotImplemented else out


def _in_pairs(x: Tensor, weight: Tensor) -> Tensor:
    """By instructions for pairs of bfloat16, if the processor has them."""
    run, (columns, n) = function("linear"), weight.shape
    if run is None or n % INPUT_MULTIPLE:
        return NotImplemented
    out = x.new_empty(x.shape[0], columns)
    done = run(pointer(x), pointer(weight), x.shape[0], columns, n, pointer(out), threads())
    return out if done else NotImplemented


def _in_floats(x: Tensor, weight: Tensor) -> Tensor:
    run, (columns, n) = function("linear_floats"), weight.shape
    if run is None or x.dtype not in DTYPES or n % FLOATS_MULTIPLE:
        return NotImplemented
    out = x.new_empty(x.shape[0], columns)
    sizes = (x.shape[0], columns, n)
    run(pointer(x), pointer(weight), *sizes, pointer(out), is_bf16(x), threads())
    return out
