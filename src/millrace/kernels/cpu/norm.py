"""RMS norms on the CPU, each in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.kernels.cpu.call import KINDS, at, function, is_bf16, plain, threads


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference."""
    found = _norm(x, None, weight, eps)
    return NotImplemented if found is None else found[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the reference."""
    if not plain(residual) or residual.dtype != x.dtype:
        return NotImplemented
    found = _norm(x, residual, weight, eps)
    return NotImplemented if found is None else found


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor] | None:
    """(the norm, what was normed); None where the function cannot be used."""
    run, n = function("rms_norm"), x.shape[-1]
    if run is None or not plain(x, weight) or weight.dtype != torch.float32:
        return None
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    run(
        *(at(x), at(residual), at(weight), eps, x.numel() // n, n, n),
        *(at(total), at(out), is_bf16(x), threads()),
    )
    return out, total


def gated_rms_norm(o: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference."""
    run = function("gated_rms_norm")
    tokens, heads, n = o.shape
    if run is None or not plain(o, weight) or weight.dtype != torch.float32:
        return NotImplemented
    if z.dtype != o.dtype or z.dtype not in KINDS or z.stride()[1:] != (n, 1):
        return NotImplemented
    out = o.new_empty(tokens, heads * n)
    run(
        *(at(o), at(z), z.stride(0), at(weight), eps, tokens * heads),
        *(heads, n, at(out), is_bf16(o), threads()),
    )
    return out
