"""Attention on the GPU: the ops of `millrace.kernels.attention`, gathered from their modules."""

from __future__ import annotations

from millrace.kernels.gpu.attention.decode import attend_decode
from millrace.kernels.gpu.attention.inputs import norm_rope_store, store_kv
from millrace.kernels.gpu.attention.prefill import attend_prefill

__all__ = ["attend_decode", "attend_prefill", "norm_rope_store", "store_kv"]
