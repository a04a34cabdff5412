"""RMS norms on the CPU, each in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.kernels.cpu.call import DTYPES, all_contiguous, function, is_bf16, pointer, threads


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference."""
    found = _norm(x, None, weight, eps)
    return NotImplemented if found is None else found[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the reference."""
    if not all_contiguous(residual) or residual.dtype != x.dtype:
        return NotImplemented
    found = _norm(x, residual, weight, eps)
    return NotImplemented if found is None else found


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor] | None:
    """(the norm, its input); None if the function does not support the arguments."""
    run, n = function("rms_norm"), x.shape[-1]
    if run is None or not all_contiguous(x, weight) or weight.dtype != torch.float32:
        return None
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    run(
        *(pointer(x), pointer(residual), pointer(weight), eps, x.numel() // n, n, n),
        *(pointer(total), pointer(out), is_bf16(x), threads()),
    )
    return out, total


def gated_rms_norm(o: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference."""
    run = function("gated_rms_norm")
    tokens, heads, n = o.shape
    if run is None or not all_contiguous(o, weight) or weight.dtype != torch.float32:
        return NotImplemented
    if z.dtype != o.dtype or z.dtype not in DTYPES or z.stride()[1:] != (n, 1):
        return NotImplemented
    out = o.new_empty(tokens, heads * n)
    run(
        *(pointer(o), pointer(z), z.stride(0), pointer(weight), eps, tokens * heads),
        *(heads, n, pointer(out), is_bf16(o), threads()),
    )
    return out
