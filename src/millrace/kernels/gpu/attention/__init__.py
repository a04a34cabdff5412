"""Attention on the GPU: the ops of `millrace.kernels.attention`, gathered from their modules."""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.kernels.batch import Batch, KVCache
from millrace.kernels.gpu.attention.decode import attend_decode
from millrace.kernels.gpu.attention.inputs import norm_rope_store, store_kv
from millrace.kernels.gpu.attention.prefill import attend_prefill
from millrace.kernels.overlap import decode_and_prefill

__all__ = ["attend", "attend_decode", "attend_prefill", "norm_rope_store", "store_kv"]


def attend(
    q: Tensor, cache: KVCache, block_table: Tensor, batch: Batch, scale: float, first: int = 0
) -> Tensor:
    """As the reference; what padded tokens get is undefined."""
    q = q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decode_and_prefill(
        batch,
        lambda rows: attend_decode(q, cache, block_table, rows, scale, first, out=out),
        lambda rows: attend_prefill(q, cache, block_table, rows, scale, first, out=out),
    )
    return out
