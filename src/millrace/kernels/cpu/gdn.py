"""Gated DeltaNet on the CPU: states and windows are read and written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.kernels.batch import DecodeRows, FixedRows, GDNState, PrefillRows
from millrace.kernels.cpu.call import (
    DTYPES,
    LANES,
    all_contiguous,
    function,
    is_bf16,
    pointer,
    rows_contiguous,
    threads,
)


def conv_decode(
    x: Tensor, cache: GDNState, weight: Tensor, rows: DecodeRows, conv_offset: Tensor
) -> Tensor:
    """As the reference; rounded once, after silu."""
    offsets = torch.arange(0, x.shape[0] + 1, rows.width, dtype=torch.int32)
    return _conv(x, cache, weight, rows.slots, offsets, conv_offset, rows.width + 2)


def conv_prefill(
    x: Tensor, cache: GDNState, weight: Tensor, rows: PrefillRows, conv_offset: Tensor
) -> Tensor:
    """As the reference; rounded once, after silu."""
    return _conv(x, cache, weight, rows.slots, rows.offsets, conv_offset, 3)


def _conv(
    x: Tensor,
    cache: GDNState,
    weight: Tensor,
    slots: Tensor,
    offsets: Tensor,
    conv_offset: Tensor,
    keep: int,
) -> Tensor:
    """keep: how many inputs, the row's last ones, the buffer has afterwards."""
    run = function("conv")
    if run is None or not rows_contiguous(x) or not all_contiguous(weight, cache.conv):
        return NotImplemented
    if not x.dtype == weight.dtype == cache.conv.dtype:
        return NotImplemented
    out = torch.empty(x.shape, dtype=x.dtype)
    slots = slots.contiguous()
    run(
        *(
            pointer(x),
            x.stride(0),
            pointer(cache.conv),
            cache.conv.shape[1],
            x.shape[1],
            pointer(weight),
        ),
        *(
            pointer(conv_offset),
            pointer(slots),
            pointer(offsets),
            slots.shape[0],
            keep,
            pointer(out),
        ),
        *(is_bf16(x), threads()),
    )
    return out


def gdn_decode(
    qkv: Tensor, g: Tensor, beta: Tensor, cache: GDNState, fill: Tensor, rows: DecodeRows
) -> Tensor:
    """As the reference."""
    return _decode(qkv, (g, beta), (None, None), cache, fill, rows)


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
    """As the reference."""
    return _decode(qkv, (a, b), (A_log, dt_bias), cache, fill, rows)


def _decode(
    qkv: Tensor,
    gates: tuple[Tensor, Tensor],
    gating: tuple[Tensor | None, Tensor | None],
    cache: GDNState,
    fill: Tensor,
    decode: DecodeRows,
) -> Tensor:
    """gates: a and b with gating = A_log and dt_bias, or g and beta with gating = None."""
    run, sizes = function("gdn_decode"), _sizes(cache)
    a, b = gates
    if run is None or sizes is None or not rows_contiguous(qkv) or not _same_layout(a, b):
        return NotImplemented
    out = qkv.new_empty(qkv.shape[0], *cache.state.shape[1:2], cache.state.shape[3])
    slots = decode.slots.contiguous()
    buffers = (cache.state, cache.window_k, cache.window_u, cache.window_g)
    run(
        *(pointer(x) for x in (qkv, a, b, *gating, *buffers, fill, slots, out)),
        *(is_bf16(x) for x in (qkv, a, cache.state, cache.window_k)),
        *(slots.shape[0], decode.width, cache.window_k.shape[2]),
        *(qkv.stride(0), a.stride(0), *sizes, threads()),
    )
    return out


def gdn_prefill(qkv: Tensor, g: Tensor, beta: Tensor, cache: GDNState, rows: PrefillRows) -> Tensor:
    """As the reference, in chunks of 16 tokens per head; the state stays in the L2 cache."""
    run, sizes = function("gdn_prefill"), _sizes(cache)
    if run is None or sizes is None or not rows_contiguous(qkv) or not _same_layout(g, beta):
        return NotImplemented
    if g.dtype != torch.float32:
        return NotImplemented
    out = qkv.new_empty(qkv.shape[0], *cache.state.shape[1:2], cache.state.shape[3])
    slots = rows.slots.contiguous()
    run(
        *(pointer(x) for x in (qkv, g, beta, cache.state, slots, rows.offsets, out)),
        *(is_bf16(qkv), is_bf16(cache.state), slots.shape[0]),
        *(qkv.stride(0), g.stride(0), *sizes, threads()),
    )
    return out


def gdn_fixed(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cache: GDNState,
    fill: Tensor,
    rows: FixedRows,
) -> Tensor:
    """As the reference; windows are read and written in place."""
    run, sizes = function("gdn_fixed"), _sizes(cache)
    if run is None or sizes is None or not rows_contiguous(qkv) or not _same_layout(a, b):
        return NotImplemented
    if cache.window_k.dtype != torch.float32 or cache.window_k.shape[2] % LANES:
        return NotImplemented
    out = qkv.new_empty(qkv.shape[0], *cache.state.shape[1:2], cache.state.shape[3])
    slots, offsets = rows.slots.contiguous(), rows.offsets.contiguous()
    buffers = (cache.state, cache.window_k, cache.window_u, cache.window_g)
    run(
        *map(pointer, (qkv, a, b, A_log, dt_bias, *buffers, fill, slots)),
        *(pointer(offsets), pointer(out)),
        *(is_bf16(x) for x in (qkv, a, cache.state)),
        *(slots.shape[0], cache.window_k.shape[2], int(rows.prompts)),
        *(qkv.stride(0), a.stride(0), *sizes, threads()),
    )
    return out


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two gate tensors have the same dtype and strides."""
    same = a.dtype == b.dtype and a.stride() == b.stride()
    return same and a.dtype in DTYPES and a.stride(1) == 1


def _sizes(cache: GDNState) -> tuple[int, int, int, int] | None:
    """(key_heads, value_heads, key_dim, value_dim); None if the functions do not support them."""
    key_heads, _, key_dim = cache.window_k.shape[1:]
    value_heads, _, value_dim = cache.state.shape[1:]
    buffers = (cache.state, cache.window_k, cache.window_u, cache.window_g)
    if key_dim % LANES or value_dim % LANES or not all_contiguous(*buffers):
        return None
    if cache.window_u.dtype != torch.float32 or cache.window_g.dtype != torch.float32:
        return None
    return key_heads, value_heads, key_dim, value_dim
