"""One-shot all-reduce over peer memory, alone or with the residual add and the norm that follow.

Every rank puts its part where all others can read it, raises a flag at each of them, waits for
theirs and adds all parts up in rank order, then the residual, in float32: the same bits everywhere,
rounded once. A program does one token and waits for the programs of the same number on the other
ranks only. No multicast.

What a call wrote is read by peers until they have finished that call; so calls alternate between
two halves of the buffer, and a rank that has passed the flags of one call knows that all have
finished the one before. Flags and halves count calls on the device, so that a CUDA graph may hold
any number of calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.gpu.quantize import empty_quantized, quantize_groups
from millrace.kernels.quantize import GROUP, Quantized

EVER = 2**31 - 1  # polls: longer than any step may take; a group that hangs is ended by its watch


@triton.jit
def _aligned(address, kind: tl.constexpr):
    """A pointer that the compiler may read 16 bytes at a time from."""
    return tl.multiple_of(address.to(kind), 16)


@triton.jit(do_not_specialize=["rank", "patience"])
def _one_shot_kernel(
    x, residual, weight, sums, normed, values, scales, buffers, flags, calls, rank, rows, width,
    patience, scale_stride, eps, SIZE: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr,
    QUANTIZE: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """sums: x over the ranks, with NORM plus the residual; then its rms_norm as asked for.

    buffers, flags: addresses by rank of [2, rows, width] values and of [rows, SIZE] counts.
    """
    token = tl.program_id(0)
    call = tl.load(calls + token) + 1
    group = tl.arange(0, G)
    channel = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = channel < width
    place = ((call & 1) * rows + token).to(tl.int64) * width + channel
    here = token.to(tl.int64) * width + channel
    kind: tl.constexpr = tl.pointer_type(x.dtype.element_ty)
    count: tl.constexpr = tl.pointer_type(tl.int32)
    part = tl.load(x + here, mask=mask, other=0.0)
    tl.store(_aligned(tl.load(buffers + rank), kind) + place, part, mask=mask)
    tl.debug_barrier()  # all of the row is written before any flag says so
    for peer in tl.static_range(SIZE):
        flag = tl.load(flags + peer).to(count) + token * SIZE + rank
        tl.atomic_xchg(flag, call, sem="release", scope="sys")
    mine = tl.load(flags + rank).to(count) + token * SIZE
    for peer in tl.static_range(SIZE):
        # The difference, so that the count may wrap around.
        polls = 0
        behind = tl.atomic_add(mine + peer, 0, sem="acquire", scope="sys") - call
        while (behind < 0) & (polls < patience):
            behind = tl.atomic_add(mine + peer, 0, sem="acquire", scope="sys") - call
            polls += 1
    tl.debug_barrier()
    total = tl.zeros((G, 128), tl.float32)
    for peer in tl.static_range(SIZE):
        theirs = _aligned(tl.load(buffers + peer), kind) + place
        total += tl.load(theirs, mask=mask, other=0.0, volatile=True).to(tl.float32)
    tl.store(calls + token, call)
    if NORM:
        total += tl.load(residual + here, mask=mask, other=0.0).to(tl.float32)
    total = total.to(sums.dtype.element_ty)
    tl.store(sums + here, total, mask=mask)
    if NORM:
        value = total.to(tl.float32)
        w = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(value * value, axis=1), axis=0) / width + eps)
        value = value * inverse * w
        if KEEP:
            tl.store(normed + here, value.to(normed.dtype.element_ty), mask=mask)
        if QUANTIZE:
            quantized, scale = quantize_groups(value)
            tl.store(values + here, quantized, mask=mask)
            at = scales + group.to(tl.int64) * scale_stride + token
            tl.store(at, scale, mask=group * 128 < width)


@dataclass(slots=True)
class PeerMemory:
    """What the ranks share. buffers, flags: int64 [size], addresses by rank, as seen from here.

    Behind them lie [2, rows, width] values of the model dtype and int32 [rows, size] counts, zero
    at first. calls: int32 [rows], our own count, zero at first. keep: what owns the memory.
    patience: polls for a flag, of about a microsecond each; then the sum is wrong.
    """

    rank: int
    size: int
    rows: int
    width: int
    buffers: Tensor
    flags: Tensor
    calls: Tensor
    keep: object = None
    patience: int = EVER

    def takes(self, x: Tensor) -> bool:
        """Whether x [T, H] has the width that the memory was made for, and not too many rows."""
        return x.dim() == 2 and 0 < x.shape[0] <= self.rows and x.shape[1] == self.width


def one_shot(x: Tensor, memory: PeerMemory) -> Tensor:
    """The sum over the ranks of x [T, H], in place. On every rank alike, T <= rows."""
    x = x.contiguous()
    _launch(x, x, x, x, None, None, 0.0, memory, norm=False)
    return x


def one_shot_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, memory: PeerMemory,
    *, keep: bool = True, quantized: bool = False,
) -> tuple[Tensor | None, Quantized | None, Tensor]:  # fmt: skip
    """(rms_norm(s), its quantised form, s) for s = the sum of x over the ranks + residual.

    x, residual: [T, H]. Only what keep and quantized ask for is computed.
    """
    x, residual = x.contiguous(), residual.contiguous()
    sums = torch.empty_like(x)
    normed = torch.empty_like(x) if keep else None
    q = empty_quantized(x.shape[0], x.shape[1], x.device) if quantized else None
    _launch(x, residual, weight, sums, normed, q, eps, memory, norm=True)
    return normed, q, sums


def _launch(
    x: Tensor, residual: Tensor, weight: Tensor, sums: Tensor, normed: Tensor | None,
    q: Quantized | None, eps: float, memory: PeerMemory, norm: bool,
) -> None:  # fmt: skip
    tokens, width = x.shape
    groups = triton.next_power_of_2(-(-width // GROUP))
    _one_shot_kernel[(tokens,)](
        x, residual, weight, sums, x if normed is None else normed,
        *(q or (x, x)), memory.buffers, memory.flags, memory.calls, memory.rank, memory.rows,
        width, memory.patience, q.scales.stride(1) if q else 0, eps, SIZE=memory.size, NORM=norm,
        KEEP=normed is not None, QUANTIZE=q is not None, G=groups,
        num_warps=max(1, min(16, groups // 2)),
    )  # fmt: skip
