"""Gated DeltaNet on the GPU: the ops of `millrace.kernels.gdn`, gathered from their modules."""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.kernels.batch import Batch, DecodeRows, GDNState, PrefillRows
from millrace.kernels.dispatch import is_invariant
from millrace.kernels.gpu.gdn.conv import conv_decode, conv_prefill, gates
from millrace.kernels.gpu.gdn.decode import launch
from millrace.kernels.gpu.gdn.fixed import gdn_fixed, gdn_of_batch
from millrace.kernels.gpu.gdn.prefill import gdn_prefill
from millrace.kernels.gpu.overlap import decode_and_prefill

__all__ = [
    "conv_decode",
    "conv_prefill",
    "gates",
    "gdn",
    "gdn_decode",
    "gdn_decode_conv",
    "gdn_decode_raw",
    "gdn_fixed",
    "gdn_prefill",
]


def gdn_decode(
    qkv: Tensor, g: Tensor, beta: Tensor, cache: GDNState, fill: Tensor, rows: DecodeRows
) -> Tensor:
    """As the reference."""
    return launch(qkv, g, beta, None, cache, fill, rows)


def gdn_decode_raw(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cache: GDNState,
    fill: Tensor,
    rows: DecodeRows,
) -> Tensor:
    """`gates` and `gdn_decode` in one: a, b [D * width, value_heads], slices of one projection."""
    return launch(qkv, a, b, (A_log, dt_bias), cache, fill, rows)


def gdn_decode_conv(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cache: GDNState,
    fill: Tensor,
    conv_offset: Tensor,
    rows: DecodeRows,
) -> Tensor:
    """As the reference; x, a and b may be slices of projections."""
    conv = (weight, conv_offset)
    return launch(x, a, b, (A_log, dt_bias), cache, fill, rows, conv=conv)


def gdn(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cache: GDNState,
    fill: Tensor,
    conv_offset: Tensor,
    batch: Batch,
) -> Tensor:
    """As the reference; what padded tokens get is undefined. x, a and b may be slices."""
    if is_invariant():
        return gdn_of_batch(x, weight, a, b, (A_log, dt_bias), cache, fill, conv_offset, batch)
    heads, dim = cache.state.shape[1], cache.state.shape[3]
    out = torch.empty(x.shape[0], heads, dim, dtype=x.dtype, device=x.device)
    gating = (A_log, dt_bias)

    def decode(rows: DecodeRows) -> None:
        launch(x, a, b, gating, cache, fill, rows, conv=(weight, conv_offset), out=out)

    def prefill(rows: PrefillRows) -> None:
        qkv = conv_prefill(x, cache, weight, rows, conv_offset)
        gdn_prefill(qkv, *gates(a, b, *gating), cache, rows, out=out)

    decode_and_prefill(batch, decode, prefill)
    return out
