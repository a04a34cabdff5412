"""The short convolution of a GDN layer with its buffer of past inputs, and the gates.

A program owns a strip of channels, so what it reads from the buffer nobody else overwrites. Prefill
cuts its tokens into blocks that all may read the old buffer; a second kernel rewrites it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.batch import DecodeRows, GDNState, PrefillRows

STRIP = 512
PROMPT_TILE = (32, 128, 4)  # tokens, channels, warps


@triton.jit
def _taps(weight, c, mask, STRIP: tl.constexpr):
    """The four weights of each channel, read as one piece: 4 vectors [STRIP]."""
    at = weight + c[:, None] * 4 + tl.arange(0, 4)[None, :]
    w = tl.load(at, mask=mask[:, None], other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(w, (STRIP, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _conv_decode_kernel(
    x, buffer, weight, slots, offsets, out, x_stride, slot_stride, C,
    N: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    c = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    mask = c < C
    slot = tl.load(slots + row).to(tl.int64)
    mask = mask & (slot != 0)  # else the row is padding, and has no tokens
    old = buffer + slot * slot_stride + tl.load(offsets + slot).to(tl.int64) * C + c
    w0, w1, w2, w3 = _taps(weight, c, mask, STRIP)
    i0 = tl.load(old, mask=mask, other=0.0)
    i1 = tl.load(old + C, mask=mask, other=0.0)
    i2 = tl.load(old + 2 * C, mask=mask, other=0.0)
    new = buffer + slot * slot_stride + c
    tl.store(new, i1, mask=mask)
    tl.store(new + C, i2, mask=mask)
    for t in tl.static_range(N):
        token = (row * N + t).to(tl.int64)
        i3 = tl.load(x + token * x_stride + c, mask=mask, other=0.0)
        tl.store(new + (t + 2) * C, i3, mask=mask)
        y = i0.to(tl.float32) * w0 + i1.to(tl.float32) * w1
        y = y + i2.to(tl.float32) * w2 + i3.to(tl.float32) * w3
        y = y / (1.0 + tl.exp(-y))
        tl.store(out + token * C + c, y.to(out.dtype.element_ty), mask=mask)
        i0 = i1
        i1 = i2
        i2 = i3


@triton.jit(do_not_specialize=["T"])
def _conv_prefill_kernel(
    x, buffer, weight, slots, offsets, places, out, x_stride, slot_stride, T, C,
    BLOCK: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens of the batch. slots: of each token; places: of each in its row, or -1."""
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + token, mask=token < T, other=-1)
    if tl.max(place, axis=0) >= 0:
        c = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
        inside = (c < C)[None, :]
        live = place >= 0
        first = live & (place < 3)  # these read the buffer too
        slot = tl.load(slots + token, mask=first, other=0)
        offset = tl.load(offsets + slot, mask=first, other=0)
        old = slot * slot_stride + (offset + place).to(tl.int64) * C
        y = tl.zeros((BLOCK, STRIP), tl.float32)
        for tap in tl.static_range(4):
            behind = place - 3 + tap
            at = x + (token - 3 + tap).to(tl.int64)[:, None] * x_stride + c[None, :]
            value = tl.load(at, mask=(live & (behind >= 0))[:, None] & inside, other=0.0)
            if tap < 3:
                past = (first & (behind < 0))[:, None] & inside
                value += tl.load(buffer + (old + tap * C)[:, None] + c[None, :], past, other=0.0)
            w = tl.load(weight + c * 4 + tap, mask=c < C, other=0.0).to(tl.float32)
            y += value.to(tl.float32) * w[None, :]
        y = y / (1.0 + tl.exp(-y))
        to = token.to(tl.int64)[:, None] * C + c[None, :]
        tl.store(out + to, y.to(out.dtype.element_ty), mask=live[:, None] & inside)


@triton.jit(do_not_specialize_on_alignment=["slots", "starts"])
def _keep_last_kernel(
    x, buffer, slots, offsets, starts, x_stride, slot_stride, C, STRIP: tl.constexpr
):
    """Leave a row's last three inputs in buffer rows 0 .. 2."""
    row = tl.program_id(1)
    c = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    mask = c < C
    start = tl.load(starts + row).to(tl.int64)
    end = tl.load(starts + row + 1).to(tl.int64)
    if end > start:
        slot = tl.load(slots + row).to(tl.int64)
        new = buffer + slot * slot_stride + c
        old = new + tl.load(offsets + slot).to(tl.int64) * C
        for j in tl.static_range(3):
            token = end - 3 + j
            # Row j of the new buffer is at or before row j of the old one, which is read by then.
            past = tl.load(old + (token - start + 3) * C, mask=mask & (token < start), other=0.0)
            value = tl.load(x + token * x_stride + c, mask=mask & (token >= start), other=0.0)
            tl.store(new + j * C, value + past, mask=mask)


@triton.jit
def _gates_kernel(a, b, a_log, dt_bias, g, beta, a_stride, b_stride, heads, HB: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HB)
    mask = h < heads
    x = tl.load(a + token * a_stride + h, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(dt_bias + h, mask=mask, other=0.0)
    soft = tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(x)))
    decay = -tl.exp(tl.load(a_log + h, mask=mask, other=0.0)) * soft
    y = tl.load(b + token * b_stride + h, mask=mask, other=0.0).to(tl.float32)
    tl.store(g + token * heads + h, decay, mask=mask)
    tl.store(beta + token * heads + h, 1.0 / (1.0 + tl.exp(-y)), mask=mask)


def gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference; a and b may be slices of one projection."""
    tokens, heads = a.shape
    g = torch.empty(tokens, heads, dtype=torch.float32, device=a.device)
    beta = torch.empty_like(g)
    if tokens:
        _gates_kernel[(tokens,)](
            a, b, A_log, dt_bias, g, beta, a.stride(0), b.stride(0), heads,
            HB=triton.next_power_of_2(heads), num_warps=1,
        )  # fmt: skip
    return g, beta


def conv_decode(
    x: Tensor, cache: GDNState, weight: Tensor, rows: DecodeRows, conv_offset: Tensor
) -> Tensor:
    """As the reference; x may be a slice of a wider projection."""
    channels = x.shape[1]
    out = torch.empty(x.shape[0], channels, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        _conv_decode_kernel[(triton.cdiv(channels, STRIP), rows.slots.shape[0])](
            x, cache.conv, weight, rows.slots, conv_offset, out, x.stride(0),
            cache.conv.stride(0), channels, N=rows.width, STRIP=STRIP, num_warps=2,
        )  # fmt: skip
    return out


def conv_prefill(
    x: Tensor, cache: GDNState, weight: Tensor, rows: PrefillRows, conv_offset: Tensor
) -> Tensor:
    """As the reference; x may be a slice of a wider projection, and rows stand anywhere in it."""
    tokens, channels = x.shape
    out = torch.empty(tokens, channels, dtype=x.dtype, device=x.device)
    scalars = (x.stride(0), cache.conv.stride(0))
    block, strip, warps = PROMPT_TILE
    _conv_prefill_kernel[(triton.cdiv(channels, strip), triton.cdiv(tokens, block))](
        x, cache.conv, weight, rows.token_slots(tokens), conv_offset, rows.places(tokens), out,
        *scalars, tokens, channels, BLOCK=block, STRIP=strip, num_warps=warps,
    )  # fmt: skip
    _keep_last_kernel[(triton.cdiv(channels, STRIP), rows.slots.shape[0])](
        x, cache.conv, rows.slots, conv_offset, rows.offsets, *scalars, channels, STRIP=STRIP,
        num_warps=2,
    )  # fmt: skip
    return out
