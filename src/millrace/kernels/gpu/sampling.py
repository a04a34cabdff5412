"""Choosing tokens in one pass over the logits. See `millrace.kernels.sampling` for the rule.

The vocabulary of a row is cut into pieces, a program each, whose best candidates a second kernel
compares. What top_k and top_p keep is found before, in `threshold`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.gpu.threshold import keep_threshold
from millrace.kernels.sampling import NOTHING

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
    logits, temperature, floors, seed, position, best, where, stride, V, start, pieces,
    NOISE: tl.constexpr, FILTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row.to(tl.int64) * stride + v
    score = tl.load(at, mask=v < V, other=-float("inf")).to(tl.float32)
    usable = score < float("inf")  # False for NaN, which would otherwise never be the largest
    if FILTER:
        score = tl.where(score >= tl.load(floors + row), score, -float("inf"))
    if NOISE:
        heat = tl.load(temperature + row)
        if heat > 0:
            token = (start + v).to(tl.uint32)
            noise = _noise(tl.load(seed + row), tl.load(position + row), token)
            score = score + heat * noise
    score = tl.where(usable, score, float("inf"))
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
