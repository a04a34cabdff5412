"""What stands between the attention projection and attention: norms, rotation, the caches' rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.batch import KVCache


@triton.jit
def _norm_rope(
    x, weight, cos_sin, eps, D: tl.constexpr, DB: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr
):
    """One head: normed where there is a weight, then rotated. x, cos_sin: pointers to rows."""
    d = tl.arange(0, DB)
    value = tl.load(x + d, mask=d < D, other=0.0)
    dtype = value.dtype
    HALF: tl.constexpr = R // 2
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    turned = d < R
    other = tl.load(x + partner, mask=turned, other=0.0).to(tl.float32)
    value = value.to(tl.float32)
    if NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / D + eps)
        value = value * inverse * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
        other *= inverse * tl.load(weight + partner, mask=turned, other=0.0).to(tl.float32)
        # The norm rounds to the model dtype, as the op of its own does.
        value = value.to(dtype).to(tl.float32)
        other = other.to(dtype).to(tl.float32)
    angle = d % HALF
    cos = tl.load(cos_sin + angle, mask=turned, other=1.0)
    sin = tl.load(cos_sin + HALF + angle, mask=turned, other=0.0)
    sign = tl.where(d < HALF, -sin, sin)
    return tl.where(turned, value * cos + other * sign, value)


@triton.jit
def _round(x, dtype: tl.constexpr):
    """To a cache's dtype; e4m3 saturates."""
    if dtype == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -448.0, 448.0)
    return x.to(dtype)


@triton.jit
def _qkv_kernel(
    qkv, q_weight, k_weight, positions, cos_sin, kv_rows, q_out, keys, values, stride, k_first,
    v_first, HEADS, KV_HEADS, eps, D: tl.constexpr, DB: tl.constexpr, R: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """One head of one token: a query, a key or a value, in this order."""
    token = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0)
    d = tl.arange(0, DB)
    angles = cos_sin + tl.load(positions + token) * R
    base = qkv + token * stride
    if head < HEADS:
        y = _norm_rope(base + head * D, q_weight, angles, eps, D, DB, R, NORM)
        q_at = q_out + (token * HEADS + head) * D + d
        tl.store(q_at, y.to(q_out.dtype.element_ty), mask=d < D)
    else:
        row = tl.load(kv_rows + token).to(tl.int64)
        kh = (head - HEADS) % KV_HEADS
        at = (row * KV_HEADS + kh) * D + d
        if head < HEADS + KV_HEADS:
            y = _norm_rope(base + k_first + kh * D, k_weight, angles, eps, D, DB, R, NORM)
            y = y.to(qkv.dtype.element_ty)
            tl.store(keys + at, _round(y, keys.dtype.element_ty), mask=d < D)
        else:
            v = tl.load(base + v_first + kh * D + d, mask=d < D, other=0.0)
            tl.store(values + at, _round(v, values.dtype.element_ty), mask=d < D)


@triton.jit
def _store_kernel(k, v, kv_rows, keys, values, k_stride, v_stride, width, B: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * B + tl.arange(0, B)
    mask = i < width
    at = tl.load(kv_rows + token).to(tl.int64) * width + i
    new_k = tl.load(k + token * k_stride + i, mask=mask, other=0.0)
    new_v = tl.load(v + token * v_stride + i, mask=mask, other=0.0)
    tl.store(keys + at, _round(new_k, keys.dtype.element_ty), mask=mask)
    tl.store(values + at, _round(new_v, values.dtype.element_ty), mask=mask)


def store_kv(k: Tensor, v: Tensor, cache: KVCache, kv_rows: Tensor) -> None:
    """As the reference; k and v may be slices of a wider projection."""
    width = k.shape[1] * k.shape[2]
    if k.shape[0] == 0:
        return
    k, v = (x if x.stride(1) == x.shape[2] else x.contiguous() for x in (k, v))
    _store_kernel[(k.shape[0], triton.cdiv(width, 1024))](
        k, v, kv_rows, cache.keys, cache.values, k.stride(0), v.stride(0), width, B=1024
    )


def norm_rope_store(
    qkv: Tensor, widths: list[int], q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
    positions: Tensor, cos_sin: Tensor, cache: KVCache, kv_rows: Tensor,
) -> Tensor:  # fmt: skip
    """All between the attention projection and attention, in one pass.

    qkv: [T, sum(widths)], the projection's (query, gate, key, value) parts, of which queries and
    gates may be left out, with widths of 0. Norms (where there are weights) and rotates queries and
    keys, stores keys and values, returns the queries [T, query_heads, head_dim].
    """
    kv_heads, dim = cache.keys.shape[2:]
    heads = widths[0] // dim
    q = torch.empty(qkv.shape[0], heads, dim, dtype=qkv.dtype, device=qkv.device)
    k_first = widths[0] + widths[1]
    if qkv.shape[0]:
        _qkv_kernel[(heads + 2 * kv_heads, qkv.shape[0])](
            qkv, q_weight, k_weight, positions, cos_sin, kv_rows, q, cache.keys, cache.values,
            qkv.stride(0), k_first, k_first + widths[2], heads, kv_heads, eps, D=dim,
            DB=triton.next_power_of_2(dim), R=cos_sin.shape[1], NORM=q_weight is not None,
            num_warps=1,
        )  # fmt: skip
    return q
