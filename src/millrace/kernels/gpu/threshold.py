"""The smallest logit of each row that top_k and top_p keep: exact, without a sort.

A first kernel takes the largest logit of every GROUP neighbours, and their mass. The k-th largest
of these is a lower bound of the k-th largest of all. Likewise for top_p: tokens below a limit weigh
less than the limit would, each, so a group's mass says at least how much of it lies above; where
that suffices, so does the limit. A second kernel, a program a row, looks again only at groups that
reach the bound, and finds the limit 4 bits at a time, from the largest, by measuring how much lies
at or above each of 16 limits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
GROUP = 64


@triton.jit
def _ordered(x):
    """float32 as uint32 of the same order."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _unordered(key):
    """The float32 of such a uint32."""
    bits = tl.where(key >= 0x80000000, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _groups_kernel(
    logits, temperature, tops, masses, stride, V, groups,
    MASS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Each group's largest logit and, with MASS, its mass relative to that."""
    row = tl.program_id(1)
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * stride + v, mask=v < V, other=-float("inf"))
    x = tl.reshape(x.to(tl.float32), (BLOCK // GROUP, GROUP))
    top = tl.max(x, axis=1)
    g = tl.program_id(0) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    tl.store(tops + row * groups + g, top, mask=g < groups)
    if MASS:
        heat = tl.load(temperature + row)
        heat = tl.where(heat > 0, heat, 1.0)
        peak = tl.where(top == -float("inf"), 0.0, top)
        mass = tl.sum(tl.exp((x - peak[:, None]) / heat), axis=1)
        tl.store(masses + row * groups + g, mass, mask=g < groups)


@triton.jit
def _group(tops, masses, g, groups, peak, heat):
    """Groups g: the keys of their largest logits, and their mass, of that token and of all, as a
    share of the likeliest token's. 0 beyond the last."""
    top = tl.load(tops + g, mask=g < groups, other=-float("inf"))
    mass = tl.load(masses + g, mask=g < groups, other=0.0)
    own = tl.where(top > -float("inf"), tl.exp((top - peak) / heat), 0.0)
    return tl.where(g < groups, _ordered(top), 0), own, own * mass


@triton.jit
def _key(base, chosen, keys, listed, at, span, V, GROUP: tl.constexpr):
    """Keys at places `at` of the list, or else of the chosen groups' columns; 0 beyond."""
    if listed:
        key = tl.load(keys + at, mask=at < span, other=0)
    else:
        v = tl.load(chosen + at // GROUP, mask=at < span, other=0) * GROUP + at % GROUP
        live = (at < span) & (v < V)
        x = tl.load(base + v, mask=live, other=-float("inf")).to(tl.float32)
        key = tl.where(live, _ordered(x), 0)
    return key


@triton.jit
def _weight(key, kept, peak, heat, MASS: tl.constexpr):
    """1 for a key that is kept or, with MASS, its share of the likeliest token's mass."""
    share = tl.exp((_unordered(key) - peak) / heat) if MASS else 1.0
    return tl.where((key > 0) & (key >= kept), share, 0.0)


@triton.jit
def _limit(
    base, chosen, span, keys, room, kept, wanted, peak, heat, V,
    MASS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The largest key with at least `wanted` of the weight at or above it; 0 if none has so much.

    After 3 of 8 digits, or 4, the keys that still can be the limit are listed, if there is room for
    them, and only they are looked at again.
    """
    lane = tl.arange(0, WIDTH)
    digit = tl.arange(0, 16).to(tl.uint32)
    step = tl.full((), 1 << 28, tl.uint32)
    found = tl.zeros((), tl.uint32)
    above = tl.zeros((), tl.float32)  # the weight above all that are listed
    listed = tl.zeros((), tl.int32)
    for turn in range(8):
        if ((turn == 3) | (turn == 4)) & (listed == 0):
            end = found + 16 * step
            count = tl.zeros((), tl.int32)
            sums = tl.zeros((4 * WIDTH,), tl.float32)
            for start in range(0, span, 4 * WIDTH):
                at = start + tl.arange(0, 4 * WIDTH)
                key = _key(base, chosen, keys, 0, at, span, V, GROUP)
                weight = _weight(key, kept, peak, heat, MASS)
                sums += tl.where(key >= end, weight, 0.0)
                inside = (key > 0) & (key >= found) & (key < end)
                place = count + tl.cumsum(inside.to(tl.int32), axis=0) - 1
                tl.store(keys + place, key, mask=inside & (place < room))
                count += tl.sum(inside.to(tl.int32), axis=0)
            tl.debug_barrier()  # what follows reads what other threads stored
            if count <= room:
                above = tl.sum(sums, axis=0)
                span = count
                listed += 1
        limit = found + digit * step
        sums = tl.zeros((16, WIDTH), tl.float32)  # added up once, not in the loop
        for start in range(0, span, WIDTH):
            key = _key(base, chosen, keys, listed, start + lane, span, V, GROUP)
            weight = _weight(key, kept, peak, heat, MASS)
            sums += tl.where(key[None, :] >= limit[:, None], weight[None, :], 0.0)
        found = tl.max(tl.where(above + tl.sum(sums, axis=1) >= wanted, limit, found), axis=0)
        step = step >> 4
    return found


@triton.jit
def _floor_kernel(
    logits, tops, masses, chosen, keys, temperature, top_p, top_k, floors, stride, V, groups,
    room, WIDTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The smallest logit of a row that top_k, then top_p keep. chosen: int32 [rows, groups] and
    keys: uint32 [rows, room] are to work in."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride
    tops += row * groups
    masses += row * groups
    chosen += row * groups
    keys += row.to(tl.int64) * room
    k = tl.load(top_k + row)
    p = tl.maximum(tl.load(top_p + row), 1e-30)  # no mass at all would name no limit
    heat = tl.load(temperature + row)
    heat = tl.where(heat > 0, heat, 1.0)
    cut = (k > 0) & (k < V)
    lane = tl.arange(0, WIDTH)
    digit = tl.arange(0, 16).to(tl.uint32)

    # The likeliest token, and the mass of all.
    best = tl.full((WIDTH,), -float("inf"), tl.float32)
    for start in range(0, groups, WIDTH):
        g = start + lane
        best = tl.maximum(best, tl.load(tops + g, mask=g < groups, other=-float("inf")))
    peak = tl.max(best, axis=0)
    wanted = k.to(tl.float32)
    if (cut == 0) & (p < 1.0):
        sums = tl.zeros((WIDTH,), tl.float32)
        for start in range(0, groups, WIDTH):
            sums += _group(tops, masses, start + lane, groups, peak, heat)[2]
        wanted = p * tl.sum(sums, axis=0)

    # A bound that the limit cannot lie below, to 16 bits, and the groups that reach it.
    bound = tl.zeros((), tl.uint32)
    if (cut & (k <= groups)) | ((cut == 0) & (p < 1.0)):
        step = tl.full((), 1 << 28, tl.uint32)
        for _ in range(4):
            limit = bound + digit * step
            light = (GROUP - 1) * tl.exp((_unordered(limit) - peak) / heat)
            above = tl.zeros((16, WIDTH), tl.float32)
            for start in range(0, groups, WIDTH):
                key, own, mass = _group(tops, masses, start + lane, groups, peak, heat)
                least = tl.maximum(own[None, :], mass[None, :] - light[:, None])
                least = tl.where(cut, 1.0, least)
                above += tl.where(key[None, :] >= limit[:, None], least, 0.0)
            enough = tl.sum(above, axis=1) >= wanted * tl.where(cut, 1.0, 1.00001)
            bound = tl.max(tl.where(enough, limit, bound), axis=0)
            step = step >> 4
    count = tl.zeros((), tl.int32)
    for start in range(0, groups, WIDTH):
        g = start + lane
        top = tl.load(tops + g, mask=g < groups, other=-float("inf"))
        reaches = (g < groups) & (_ordered(top) >= bound)
        place = count + tl.cumsum(reaches.to(tl.int32), axis=0) - 1
        tl.store(chosen + place, g, mask=reaches)
        count += tl.sum(reaches.to(tl.int32), axis=0)
    tl.debug_barrier()  # what follows reads what other threads stored
    span = count * GROUP

    kept = tl.zeros((), tl.uint32)  # nothing cut
    if cut:
        kept = _limit(
            base, chosen, span, keys, room, kept, wanted, peak, heat, V, False, WIDTH, GROUP
        )
    if p < 1.0:
        if cut:  # of what top_k left
            sums = tl.zeros((WIDTH,), tl.float32)
            for start in range(0, span, WIDTH):
                key = _key(base, chosen, keys, 0, start + lane, span, V, GROUP)
                sums += _weight(key, kept, peak, heat, True)
            wanted = p * tl.sum(sums, axis=0)
        found = _limit(
            base, chosen, span, keys, room, kept, wanted, peak, heat, V, True, WIDTH, GROUP
        )
        kept = tl.maximum(kept, found)
    tl.store(floors + row, tl.where(kept == 0, -float("inf"), _unordered(kept)))


def keep_threshold(logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """As the reference, with the mass of top_p summed in float32."""
    rows, vocab = logits.shape
    groups = triton.cdiv(vocab, GROUP)
    device = logits.device
    tops = torch.empty(rows, groups, dtype=torch.float32, device=device)
    masses = torch.empty(rows, groups, dtype=torch.float32, device=device)
    chosen = torch.empty(rows, groups, dtype=torch.int32, device=device)
    room = triton.cdiv(vocab, 16)
    keys = torch.empty(rows, room, dtype=torch.uint32, device=device)
    floors = torch.empty(rows, dtype=torch.float32, device=device)
    _groups_kernel[(triton.cdiv(vocab, BLOCK), rows)](
        logits, temperature, tops, masses, logits.stride(0), vocab, groups,
        MASS=True, BLOCK=BLOCK, GROUP=GROUP, num_warps=4,
    )  # fmt: skip
    # A place a thread, so that warps exchange nothing until a turn ends; and 64 registers, so that
    # four rows share a multiprocessor.
    _floor_kernel[(rows,)](
        logits, tops, masses, chosen, keys, temperature, top_p, top_k, floors, logits.stride(0),
        vocab, groups, room, WIDTH=256, GROUP=GROUP, num_warps=8, maxnreg=64,
    )  # fmt: skip
    return floors
