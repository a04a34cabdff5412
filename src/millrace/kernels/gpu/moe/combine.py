"""The weighted sum over a token's experts, with the shared expert, in float32 and rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.moe import Shared

WIDTH = 1024  # channels of a program


@triton.jit
def _combine_kernel(
    made, rows, weights, shared, gate, out, width, shared_stride, gate_stride,
    TOP_K: tl.constexpr, WIDE: tl.constexpr, PLACED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """WIDE channels of a token: of its rows `rows` of `made` if PLACED, else of its own TOP_K.
    Those whose `rows` are negative count as zero."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = channel < width
    total = tl.zeros((WIDE,), tl.float32)
    for i in tl.static_range(TOP_K):
        pair = token * TOP_K + i
        place = tl.load(rows + pair)
        row = place.to(tl.int64) if PLACED else pair
        weight = tl.load(weights + pair).to(tl.float32)
        value = tl.load(made + row * width + channel, mask=inside & (place >= 0), other=0.0)
        total += weight * value.to(tl.float32)
    if SHARED:
        share = tl.load(gate + token * gate_stride).to(tl.float32)
        value = tl.load(shared + token * shared_stride + channel, mask=inside, other=0.0)
        total += value.to(tl.float32) / (1.0 + tl.exp(-share))
    tl.store(out + token * width + channel, total.to(out.dtype.element_ty), mask=inside)


def combine(
    made: Tensor, rows: Tensor, weights: Tensor, shared: Shared | None, *, placed: bool = True
) -> Tensor:
    """[T, H] in the dtype of `made`, [P, H]. rows: int32 [T * K] of it; negative: nothing is added.
    placed: else rows of `made` are token by token, and only signs of `rows` count. weights: [T, K].
    """
    (tokens, top_k), width = weights.shape, made.shape[1]
    out = torch.empty(tokens, width, dtype=made.dtype, device=made.device)
    both = Shared(made, made) if shared is None else shared
    wide = min(WIDTH, triton.next_power_of_2(width))
    if tokens:
        _combine_kernel[(tokens, triton.cdiv(width, wide))](
            made, rows, weights, both.out, both.gate, out, width,
            both.out.stride(0), both.gate.stride(0), TOP_K=top_k, WIDE=wide,
            PLACED=placed, SHARED=shared is not None, num_warps=4,
        )  # fmt: skip
    return out
