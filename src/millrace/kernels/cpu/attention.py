"""Attention over pages on the CPU: keys and values are read in place."""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.kernels.batch import DecodeRows, KVCache, PrefillRows
from millrace.kernels.cpu.call import (
    LANES,
    all_contiguous,
    function,
    is_bf16,
    pointer,
    rows_contiguous,
    threads,
)
from millrace.kernels.dispatch import is_invariant

# Dtype codes of `millrace_attend`.
KV_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}


def attend_decode(
    q: Tensor, cache: KVCache, block_table: Tensor, rows: DecodeRows, scale: float, first: int = 0
) -> Tensor:
    """As the reference; softmax and weights stay float32."""
    count = rows.slots.shape[0]
    offsets = torch.arange(0, (count + 1) * rows.width, rows.width, dtype=torch.int32)
    return _attend(q, cache, block_table, (rows.slots, rows.starts, offsets), scale, first)


def attend_prefill(
    q: Tensor, cache: KVCache, block_table: Tensor, rows: PrefillRows, scale: float, first: int = 0
) -> Tensor:
    """As the reference, in blocks of positions, with a running softmax."""
    return _attend(q, cache, block_table, (rows.slots, rows.starts, rows.offsets), scale, first)


def _attend(
    q: Tensor,
    cache: KVCache,
    block_table: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    scale: float,
    first: int,
) -> Tensor:
    """rows: slots and starts int64 [R], offsets int32 [R + 1]."""
    run = function("attend")
    page_size, kv_heads, dim = cache.keys.shape[1:]
    kind = KV_KINDS.get(cache.keys.dtype)
    if run is None or kind is None or dim % LANES or not all_contiguous(q):
        return NotImplemented
    slots, starts, offsets = (x.contiguous() for x in rows)
    out = torch.empty_like(q)
    run(
        *(
            pointer(x)
            for x in (q, cache.keys, cache.values, block_table, slots, starts, offsets, out)
        ),
        *(is_bf16(q), kind),
        *(slots.shape[0], q.shape[1], kv_heads, dim, page_size, block_table.shape[1], first),
        *(scale, int(is_invariant()), threads()),
    )
    return out


def norm_rope_store(
    qkv: Tensor,
    widths: list[int],
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    cache: KVCache,
    kv_rows: Tensor,
) -> Tensor:
    """As the reference, in one pass over the projection."""
    run = function("norm_rope_store")
    kv_heads, dim = cache.keys.shape[2:]
    weights = [x for x in (q_weight, k_weight, cos_sin) if x is not None]
    if (
        run is None
        or not rows_contiguous(qkv)
        or not all_contiguous(cache.keys, cache.values, *weights)
    ):
        return NotImplemented
    if any(x.dtype != torch.float32 for x in weights):
        return NotImplemented
    heads = widths[0] // dim
    q = qkv.new_empty(qkv.shape[0], heads, dim)
    positions, kv_rows = positions.contiguous(), kv_rows.contiguous()
    run(
        *(
            pointer(qkv),
            qkv.stride(0),
            pointer(q_weight),
            pointer(k_weight),
            eps,
            pointer(positions),
        ),
        *(
            pointer(cos_sin),
            cos_sin.shape[1],
            pointer(cache.keys),
            pointer(cache.values),
            pointer(kv_rows),
            pointer(q),
        ),
        *(is_bf16(qkv), is_bf16(cache.keys), qkv.shape[0], heads, kv_heads, dim, widths[1]),
        threads(),
    )
    return q
