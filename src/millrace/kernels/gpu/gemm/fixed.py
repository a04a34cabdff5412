"""The GEMM of batch invariant ops: tiles of one size, K in one piece, whatever the tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.gpu.gemm.bands import tile_in_bands

TILE = (64, 128, 64)  # tokens, outputs, inputs of a step


@triton.jit(do_not_specialize=["T"])
def _fixed_matmul_kernel(
    x, w, out, T, OUT, K, BT: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile_t, tile_o = tile_in_bands(tl.program_id(0), tl.cdiv(T, BT), tl.cdiv(OUT, BO), 8)
    t = tile_t * BT + tl.arange(0, BT)
    o = tile_o * BO + tl.arange(0, BO)
    k = tl.arange(0, BK)
    x_at = x + (t % T).to(tl.int64)[:, None] * K + k[None, :]
    w_at = w + (o % OUT).to(tl.int64)[:, None] * K + k[None, :]
    acc = tl.zeros((BT, BO), tl.float32)
    for step in tl.range(0, tl.cdiv(K, BK), num_stages=3):
        inside = (step * BK + k < K)[None, :]
        a = tl.load(x_at + step * BK, mask=inside, other=0.0)
        b = tl.load(w_at + step * BK, mask=inside, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc=acc, input_precision="tf32x3")
    at = out + t.to(tl.int64)[:, None] * OUT + o[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(t < T)[:, None] & (o < OUT)[None, :])


def fixed_linear(x: Tensor, weight: Tensor) -> Tensor:
    """As the reference."""
    tokens, outputs = x.shape[0], weight.shape[0]
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    bt, bo, bk = TILE
    if tokens:
        grid = (triton.cdiv(tokens, bt) * triton.cdiv(outputs, bo),)
        _fixed_matmul_kernel[grid](
            x.contiguous(), weight.contiguous(), out, tokens, outputs, weight.shape[1],
            BT=bt, BO=bo, BK=bk, num_warps=4,
        )  # fmt: skip
    return out
