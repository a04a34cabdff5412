"""Attention on the GPU: the ops of `millrace.kernels.attention`, gathered from their modules."""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.kernels.batch import Batch, KVCache
from millrace.kernels.dispatch import is_invariant
from millrace.kernels.gpu.attention.decode import attend_decode, contexts_of_kernels
from millrace.kernels.gpu.attention.fixed import attend_fixed
from millrace.kernels.gpu.attention.inputs import norm_rope_store, store_kv
from millrace.kernels.gpu.attention.prefill import attend_prefill
from millrace.kernels.gpu.overlap import decode_and_prefill
from millrace.kernels.warmup import StepLimits, StepShape, Warmup

__all__ = ["attend", "attend_decode", "attend_prefill", "norm_rope_store", "store_kv", "warmup"]
SHORT = 16  # tokens of a short prompt
SEVERAL = 3  # prompts that make several


def attend(
    q: Tensor, cache: KVCache, block_table: Tensor, batch: Batch, scale: float, first: int = 0
) -> Tensor:
    """As the reference; what padded tokens get is undefined."""
    q = q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if is_invariant():
        for rows, _ in batch.as_prompts():
            attend_fixed(q, cache, block_table, rows, scale, first, out)
        return out
    decode_and_prefill(
        batch,
        lambda rows: attend_decode(q, cache, block_table, rows, scale, first, out=out),
        lambda rows: attend_prefill(q, cache, block_table, rows, scale, first, out=out),
    )
    return out


def warmup(limits: StepLimits) -> Warmup:
    """A decode row whose keys are read as a whole, and one whose keys are cut into parts; several
    short prompts, as late in their sequences as possible: kernels differ there, too."""
    one_token = ((0, 1),)
    rows = [StepShape(1, one_token, context) for context in contexts_of_kernels(limits.length)]
    count = min(SHORT, limits.length - 1)
    prompts = max(1, min(SEVERAL, limits.rows, limits.tokens // count))
    short = StepShape(0, ((limits.length - 1 - count, count),) * prompts)
    return Warmup((*rows, short))
