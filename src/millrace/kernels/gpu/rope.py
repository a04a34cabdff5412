"""Rotary position embedding in one pass. See `millrace.kernels.rope`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rope_kernel(
    x, positions, cos_sin, out, stride, HEADS, D: tl.constexpr, DB: tl.constexpr, R: tl.constexpr
):
    token = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0)
    HALF: tl.constexpr = R // 2
    d = tl.arange(0, DB)
    at = x + token * stride + head * D
    value = tl.load(at + d, mask=d < D, other=0.0).to(tl.float32)
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    other = tl.load(at + partner, mask=d < R, other=0.0).to(tl.float32)
    angles = cos_sin + tl.load(positions + token) * R + d % HALF
    cos = tl.load(angles, mask=d < R, other=1.0)
    sin = tl.load(angles + HALF, mask=d < R, other=0.0)
    y = value * cos + other * tl.where(d < HALF, -sin, sin)
    tl.store(out + (token * HEADS + head) * D + d, y.to(out.dtype.element_ty), mask=d < D)


def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """As the reference: x [T, heads, head_dim]."""
    tokens, heads, dim = x.shape
    x = x if x.stride(1) == dim else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if tokens:
        _rope_kernel[(heads, tokens)](
            x, positions, cos_sin, out, x.stride(0), heads, D=dim,
            DB=triton.next_power_of_2(dim), R=cos_sin.shape[1], num_warps=1,
        )  # fmt: skip
    return out
