"""Choosing tokens in one pass over the logits. See `millrace.kernels.sampling` for the rule.

The vocabulary of a row is cut into pieces, a program each, whose best candidates a second kernel
compares. top_k and top_p need the smallest kept logit first: it is found 4 bits at a time, from
the largest, by measuring how much lies at or above each of 16 candidates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


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
    logits, temperature, floors, seed, position, best, where, stride, V, pieces,
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
            noise = _noise(tl.load(seed + row), tl.load(position + row), v.to(tl.uint32))
            score = score + heat * noise
    top = tl.max(score, axis=0)
    tl.store(best + row * pieces + tl.program_id(0), top)
    first = tl.min(tl.where(score == top, v, 0x7FFFFFFF), axis=0)
    tl.store(where + row * pieces + tl.program_id(0), first)


@triton.jit
def _pick_kernel(best, where, out, pieces, PB: tl.constexpr):
    row = tl.program_id(0)
    p = tl.arange(0, PB)
    score = tl.load(best + row * pieces + p, mask=p < pieces, other=-float("inf"))
    token = tl.load(where + row * pieces + p, mask=p < pieces, other=0x7FFFFFFF)
    first = tl.min(tl.where(score == tl.max(score, axis=0), token, 0x7FFFFFFF), axis=0)
    tl.store(out + row, tl.where(first == 0x7FFFFFFF, 0, first).to(tl.int64))


@triton.jit
def _ordered(x):
    """float32 as uint32 of the same order."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _floor_kernel(logits, temperature, top_p, top_k, floors, stride, V, BLOCK: tl.constexpr):
    """The smallest logit of a row that top_k, then top_p keep."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    heat = tl.load(temperature + row)
    heat = tl.where(heat > 0, heat, 1.0)
    lane = tl.arange(0, BLOCK)
    digit = tl.arange(0, 16).to(tl.uint32)
    kept = tl.zeros((), tl.uint32)  # nothing cut
    if (k > 0) & (k < V):
        shift = tl.full((16,), 28, tl.uint32)
        for _ in range(8):
            limit = kept + (digit << shift)
            above = tl.zeros((BLOCK, 16), tl.int32)  # one sum at the end, none in the loop
            for start in range(0, V, BLOCK):
                v = start + lane
                x = tl.load(base + v, mask=v < V, other=-float("inf")).to(tl.float32)
                key = tl.where(v < V, _ordered(x), 0)
                above += (key[:, None] >= limit[None, :]).to(tl.int32)
            kept = tl.max(tl.where(tl.sum(above, axis=0) >= k, limit, 0), axis=0)
            shift -= 4
    if p < 1.0:
        top = tl.full((BLOCK,), -float("inf"), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + lane
            x = tl.load(base + v, mask=v < V, other=-float("inf")).to(tl.float32)
            top = tl.maximum(top, x)
        peak = tl.max(top, axis=0)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + lane
            x = tl.load(base + v, mask=v < V, other=-float("inf")).to(tl.float32)
            total += tl.where(_ordered(x) >= kept, tl.exp((x - peak) / heat), 0.0)
        wanted = p * tl.sum(total, axis=0)
        found = tl.zeros((), tl.uint32)
        shift = tl.full((16,), 28, tl.uint32)
        for _ in range(8):
            limit = found + (digit << shift)
            mass = tl.zeros((BLOCK, 16), tl.float32)
            for start in range(0, V, BLOCK):
                v = start + lane
                x = tl.load(base + v, mask=v < V, other=-float("inf")).to(tl.float32)
                key = _ordered(x)
                weight = tl.where(key >= kept, tl.exp((x - peak) / heat), 0.0)
                mass += tl.where(key[:, None] >= limit[None, :], weight[:, None], 0.0)
            found = tl.max(tl.where(tl.sum(mass, axis=0) >= wanted, limit, 0), axis=0)
            shift -= 4
        kept = tl.maximum(kept, found)
    bits = tl.where(kept >= 0x80000000, kept & 0x7FFFFFFF, kept ^ 0xFFFFFFFF)
    floor = tl.where(kept == 0, -float("inf"), bits.to(tl.float32, bitcast=True))
    tl.store(floors + row, floor)


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
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    floors = keep_threshold(logits, temperature, top_p, top_k) if filters else temperature
    pieces = triton.cdiv(vocab, BLOCK)
    best = torch.empty(rows, pieces, dtype=torch.float32, device=logits.device)
    where = torch.empty(rows, pieces, dtype=torch.int32, device=logits.device)
    _best_kernel[(pieces, rows)](
        logits, temperature, floors, seed, position, best, where, logits.stride(0), vocab, pieces,
        NOISE=noise, FILTER=filters, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    _pick_kernel[(rows,)](best, where, out, pieces, PB=triton.next_power_of_2(pieces), num_warps=1)
    return out


def keep_threshold(logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """As the reference, with the mass of top_p summed in float32."""
    floors = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _floor_kernel[(logits.shape[0],)](
        logits, temperature, top_p, top_k, floors, logits.stride(0), logits.shape[1],
        BLOCK=512, num_warps=8,
    )  # fmt: skip
    return floors
