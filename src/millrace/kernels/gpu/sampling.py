"""Choosing tokens in one pass over the logits. See `millrace.kernels.sampling` for the rule.

The vocabulary of a row is cut into pieces, a program each, whose best candidates a second kernel
compares.

top_k and top_p need the smallest kept logit first. A first pass takes the largest logit of every
GROUP neighbours, and their mass. The k-th largest of these is a lower bound of the k-th largest of
all; and tokens less probable than (1 - p) / V, of the likeliest, are together too light to matter
for top_p. So only groups that reach the greater of the two bounds are looked at again: there the
exact limit is found 4 bits at a time, from the largest, by measuring how much lies at or above
each of 16 limits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.sampling import NOTHING

BLOCK = 4096
GROUP = 64


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _log(x):
    """Natural logarithm by the special-function unit: off by 2e-7, or that part of a large one."""
    if INTERPRETED:
        power = tl.log2(x)
    else:
        power = tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return power * 0.6931471805599453


@triton.jit
def _noise(seed, position, token):
    """Gumbel noise of uint32 tokens."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key_a = _mix(_mix(_mix(low) ^ high) ^ (position & 0xFFFFFFFF).to(tl.uint32))
    key_b = _mix(key_a + 0x9E3779B9)
    x = (token * 0x9E3779B1) ^ key_a
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) ^ key_b
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    x = x ^ (x >> 16)
    w = tl.minimum((x.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994039535522)
    # -log(1 - w); the series where 1 - w would lose w's digits.
    series = w * (1.0 + w * (0.5 + w * (0.33333334 + w * 0.25)))
    return -_log(tl.where(w < 0.03125, series, -_log(1.0 - w)))


@triton.jit
def _best_kernel(
    logits, temperature, floors, seed, position, best, where, stride, V, start, pieces,
    NOISE: tl.constexpr, FILTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row.to(tl.int64) * stride + v
    score = tl.load(at, mask=v < V, other=-float("inf")).to(tl.float32)
    if FILTER:
        score = tl.where(score >= tl.load(floors + row), score, -float("inf"))
    if NOISE:
        heat = tl.load(temperature + row)
        if heat > 0:
            token = (start + v).to(tl.uint32)
            noise = _noise(tl.load(seed + row), tl.load(position + row), token)
            score = score + heat * noise
    top = tl.max(score, axis=0)
    tl.store(best + row * pieces + tl.program_id(0), top)
    first = tl.min(tl.where(score == top, start + v, 0x7FFFFFFF), axis=0)
    tl.store(where + row * pieces + tl.program_id(0), first)


@triton.jit
def _pick_kernel(best, where, out, pieces, start, NAMED: tl.constexpr, PB: tl.constexpr):
    """NAMED: as `best` names it; otherwise the token alone."""
    row = tl.program_id(0)
    p = tl.arange(0, PB)
    score = tl.load(best + row * pieces + p, mask=p < pieces, other=-float("inf"))
    token = tl.load(where + row * pieces + p, mask=p < pieces, other=0x7FFFFFFF)
    top = tl.max(score, axis=0)
    first = tl.min(tl.where(score == top, token, 0x7FFFFFFF), axis=0)
    first = tl.where(first == 0x7FFFFFFF, start, first).to(tl.int64)
    if NAMED:
        bits = tl.where(top == 0.0, 0.0, top).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        first = (ordered << 32) | (0x7FFFFFFF - first)
    tl.store(out + row, first)


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
def _chosen_logits(base, chosen, at, span, V, GROUP: tl.constexpr):
    """Logits at places `at` of the chosen groups' columns, and their keys; -inf and 0 beyond."""
    g = tl.load(chosen + at // GROUP, mask=at < span, other=0)
    v = g * GROUP + at % GROUP
    live = (at < span) & (v < V)
    x = tl.load(base + v, mask=live, other=-float("inf")).to(tl.float32)
    return x, tl.where(live, _ordered(x), 0)


@triton.jit
def _floor_kernel(
    logits, tops, masses, chosen, temperature, top_p, top_k, floors, stride, V, groups,
    WIDTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The smallest logit of a row that top_k, then top_p keep. chosen: int32 [rows, groups]."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride
    tops += row * groups
    masses += row * groups
    chosen += row * groups
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
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
    total = tl.zeros((), tl.float32)
    if (p < 1.0) & (k <= 0):
        sums = tl.zeros((WIDTH,), tl.float32)
        for start in range(0, groups, WIDTH):
            g = start + lane
            top = tl.load(tops + g, mask=g < groups, other=-float("inf"))
            mass = tl.load(masses + g, mask=g < groups, other=0.0)
            sums += tl.where(top > -float("inf"), mass * tl.exp((top - peak) / heat), 0.0)
        total = tl.sum(sums, axis=0)

    # A bound that the limit cannot lie below, and the groups that reach it.
    bound = tl.zeros((), tl.uint32)
    if cut & (k <= groups):
        shift = tl.full((16,), 28, tl.uint32)
        for _ in range(8):
            limit = bound + (digit << shift)
            above = tl.zeros((WIDTH, 16), tl.int32)
            for start in range(0, groups, WIDTH):
                g = start + lane
                top = tl.load(tops + g, mask=g < groups, other=-float("inf"))
                key = tl.where(g < groups, _ordered(top), 0)
                above += (key[:, None] >= limit[None, :]).to(tl.int32)
            bound = tl.max(tl.where(tl.sum(above, axis=0) >= k, limit, 0), axis=0)
            shift -= 4
    if p < 1.0:
        light = tl.log((1.0 - p) / V) - 0.01  # the margin covers rounding
        bound = tl.maximum(bound, _ordered(peak + heat * light))
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
        shift = tl.full((16,), 28, tl.uint32)
        for _ in range(8):
            limit = kept + (digit << shift)
            above = tl.zeros((WIDTH, 16), tl.int32)  # one sum at the end, none in the loop
            for start in range(0, span, WIDTH):
                key = _chosen_logits(base, chosen, start + lane, span, V, GROUP)[1]
                above += (key[:, None] >= limit[None, :]).to(tl.int32)
            kept = tl.max(tl.where(tl.sum(above, axis=0) >= k, limit, 0), axis=0)
            shift -= 4
    if p < 1.0:
        if k > 0:  # of what top_k left
            sums = tl.zeros((WIDTH,), tl.float32)
            for start in range(0, span, WIDTH):
                x, key = _chosen_logits(base, chosen, start + lane, span, V, GROUP)
                sums += tl.where(key >= kept, tl.exp((x - peak) / heat), 0.0)
            total = tl.sum(sums, axis=0)
        wanted = p * total
        found = tl.zeros((), tl.uint32)
        shift = tl.full((16,), 28, tl.uint32)
        for _ in range(8):
            limit = found + (digit << shift)
            mass = tl.zeros((WIDTH, 16), tl.float32)
            for start in range(0, span, WIDTH):
                x, key = _chosen_logits(base, chosen, start + lane, span, V, GROUP)
                weight = tl.where(key >= kept, tl.exp((x - peak) / heat), 0.0)
                mass += tl.where(key[:, None] >= limit[None, :], weight[:, None], 0.0)
            found = tl.max(tl.where(tl.sum(mass, axis=0) >= wanted, limit, 0), axis=0)
            shift -= 4
        kept = tl.maximum(kept, found)
    tl.store(floors + row, tl.where(kept == 0, -float("inf"), _unordered(kept)))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    seed: Tensor,
    position: Tensor,
    *,
    noise: bool = True,
    filters: bool = True,
) -> Tensor:
    """As the reference, but for the rounding of logarithms."""
    floors = keep_threshold(logits, temperature, top_p, top_k) if filters else None
    return _best(logits, temperature, floors, seed, position, 0, noise, named=False)


def best(
    logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, start: int,
    *, noise: bool = True,
) -> Tensor:  # fmt: skip
    """As the reference, but for the rounding of logarithms; the very scores that `sample` has."""
    return _best(logits, temperature, None, seed, position, start, noise, named=True)


def _best(
    logits: Tensor, temperature: Tensor, floors: Tensor | None, seed: Tensor, position: Tensor,
    start: int, noise: bool, named: bool,
) -> Tensor:  # fmt: skip
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    if vocab == 0:
        return out.fill_(NOTHING)
    pieces = triton.cdiv(vocab, BLOCK)
    scores = torch.empty(rows, pieces, dtype=torch.float32, device=logits.device)
    where = torch.empty(rows, pieces, dtype=torch.int32, device=logits.device)
    _best_kernel[(pieces, rows)](
        logits, temperature, temperature if floors is None else floors, seed, position, scores,
        where, logits.stride(0), vocab, start, pieces,
        NOISE=noise, FILTER=floors is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    _pick_kernel[(rows,)](
        scores, where, out, pieces, start,
        NAMED=named, PB=triton.next_power_of_2(pieces), num_warps=1,
    )  # fmt: skip
    return out


def keep_threshold(logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """As the reference, with the mass of top_p summed in float32."""
    rows, vocab = logits.shape
    groups = triton.cdiv(vocab, GROUP)
    device = logits.device
    tops = torch.empty(rows, groups, dtype=torch.float32, device=device)
    masses = torch.empty(rows, groups, dtype=torch.float32, device=device)
    chosen = torch.empty(rows, groups, dtype=torch.int32, device=device)
    floors = torch.empty(rows, dtype=torch.float32, device=device)
    _groups_kernel[(triton.cdiv(vocab, BLOCK), rows)](
        logits, temperature, tops, masses, logits.stride(0), vocab, groups,
        MASS=True, BLOCK=BLOCK, GROUP=GROUP, num_warps=4,
    )  # fmt: skip
    _floor_kernel[(rows,)](
        logits, tops, masses, chosen, temperature, top_p, top_k, floors, logits.stride(0), vocab,
        groups, WIDTH=512, GROUP=GROUP, num_warps=8,
    )  # fmt: skip
    return floors
