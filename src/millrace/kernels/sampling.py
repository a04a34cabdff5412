"""Sampling a token from logits: greedy, or with noise that depends only on (seed, position).

A sample is the Gumbel-max rule: the token with the largest `logit + temperature * noise`. The noise
of a token is a hash of the request's seed, the position and the token id. So a sample does not
depend on batch, step or device, and needs neither a softmax nor state. Temperature 0 is the greedy
choice by the same formula. This module knows no request and no step.

The noise, in 32-bit unsigned arithmetic (`mix` is the finaliser of MurmurHash3):

    key_a = mix(mix(seed_low) ^ seed_high);  key_a = mix(key_a ^ position_low)
    key_b = mix(key_a + 0x9E3779B9)
    x = (token * 0x9E3779B1) ^ key_a
    x = (x ^ (x >> 16)) * 0x85EBCA6B;  x = x ^ key_b
    x = (x ^ (x >> 13)) * 0xC2B2AE35;  x = x ^ (x >> 16)
    w = min((float32(x) + 0.5) * 2**-32, 1 - 2**-24)
    noise = -log(-log1p(-w))

`w` is small where the noise is large, so float32 resolves the tail that decides a sample.

If each rank has a part of the vocabulary, each reports the best token of its part (`best`) as one
integer. The order of these integers is the order of the rule, so the largest one over all ranks
gives the token (`token_of`).

A row with a logit that is NaN or +inf samples such a token. So the logit of the sampled token tells
whether the row is usable: `checked` and `checked_token_of` put NOT_FINITE in place of the token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.kernels.dispatch import by_token, op

_GOLDEN = -0x61C88647  # 0x9E3779B9 as int32
_STRIDE = -0x61C8864F  # 0x9E3779B1
_MUL_A = -0x7A143595  # 0x85EBCA6B
_MUL_B = -0x3D4D51CB  # 0xC2B2AE35
_LARGEST = 1.0 - 2.0**-24
_LAST = (1 << 31) - 1
NOTHING = -(1 << 63)  # the result of `best` for an empty part
NOT_FINITE = -2  # in place of a token, where a row's logits are NaN or +inf
_INFINITY = 0x7F800000  # the bits of +inf; `best` reports NaN as +inf


def gumbel(seed: Tensor, position: Tensor, vocab: int, start: int = 0) -> Tensor:
    """Standard Gumbel noise for tokens start .. start + vocab of each row.

    seed, position: int64 [R]. Returns float32 [R, vocab], finite.
    """
    key_a, key_b = row_keys(seed, position)
    x = torch.arange(start, start + vocab, dtype=torch.int32, device=seed.device) * _STRIDE
    x = x ^ key_a[:, None]
    x = (x ^ _shift(x, 16)).mul_(_MUL_A).bitwise_xor_(key_b[:, None])
    x = (x ^ _shift(x, 13)).mul_(_MUL_B)
    x.bitwise_xor_(_shift(x, 16))
    w = x.view(torch.uint32).to(torch.float32)
    w.add_(0.5).mul_(2.0**-32).clamp_(max=_LARGEST)
    return w.neg_().log1p_().neg_().log_().neg_()


def row_keys(seed: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The two 32-bit keys of each row's noise; seed, position: int64 [R]; int32 [R] each."""
    key = _mix(_mix(_low(seed)) ^ _low(seed >> 32))
    key = _mix(key ^ _low(position))
    return key, _mix(key + _GOLDEN)


@op
@by_token("logits", "temperature", "top_p", "top_k", "seed", "position")
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
    """One token for each row of logits.

    logits: float [R, V], -inf where a token is forbidden. temperature, top_p: float32 [R]; top_k,
    seed, position: int64 [R]; position is the position of the sampled token in its sequence.
    noise: some row has a temperature above 0. filters: some row has a top_k or top_p that cuts.
    False saves the work. Ties go to the lowest id. Returns int64 [R].
    """
    logits = logits.float()
    if filters:
        floor = keep_threshold(logits, temperature, top_p, top_k)
        logits = logits.masked_fill(logits < floor[:, None], -torch.inf)
    if noise:
        drawn = gumbel(seed, position, logits.shape[1])
        logits = torch.addcmul(logits, drawn, temperature[:, None])
    return logits.argmax(dim=1)


@op
@by_token("logits", "temperature", "seed", "position")
def best(
    logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, start: int,
    *, noise: bool = True,
) -> Tensor:  # fmt: skip
    """The best token of each row among the tokens start .. start + n, as int64 [R].

    logits: float [R, n] of these tokens; the rest as in `sample`, without filters. High word: the
    score's bits as an integer of the same order. Low word: 2^31 - 1 - token, so that of equal
    scores the lowest id wins. NOTHING if n is 0.
    """
    rows, count = logits.shape
    if count == 0:
        return torch.full((rows,), NOTHING, dtype=torch.int64, device=logits.device)
    scores = logits.float()
    if noise:
        drawn = gumbel(seed, position, count, start)
        scores = torch.addcmul(scores, drawn, temperature[:, None])
    place = scores.argmax(dim=1, keepdim=True)
    score = scores.gather(1, place) + 0.0  # so that -0.0 equals 0.0
    score = torch.where(score < torch.inf, score, torch.inf)  # NaN has no order
    bits = score.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ _LAST, bits).to(torch.int64)
    return ((ordered << 32) | (_LAST - start - place))[:, 0]


def token_of(found: Tensor) -> Tensor:
    """The token of a result of `best`: int64 of the same shape."""
    return _LAST - (found & 0xFFFFFFFF)


def checked(logits: Tensor, tokens: Tensor) -> Tensor:
    """Tokens that were sampled from the rows of logits, NOT_FINITE for rows that are not usable.

    logits: float [R, V]; tokens: int64 [R]. Returns int64 [R]. It reads one logit of each row.
    """
    usable = logits.gather(1, tokens[:, None])[:, 0] < torch.inf  # False for NaN
    return torch.where(usable, tokens, NOT_FINITE)


def checked_token_of(found: Tensor) -> Tensor:
    """`token_of`, but NOT_FINITE for rows that are not usable."""
    return torch.where(found >> 32 < _INFINITY, token_of(found), NOT_FINITE)


def keep_threshold(logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """The smallest logit of each row that top_k and then top_p keep; equal logits stay together.

    top_k <= 0 keeps every token. top_p keeps the smallest set of these, most probable first, whose
    share of their mass reaches top_p. In rows of temperature 0 only the largest logit matters,
    which is always kept. Arguments as in `sample`, logits float32; float32 [R].
    """
    vocab = logits.shape[1]
    ranked = logits.sort(dim=1, descending=True).values
    count = torch.where(top_k <= 0, vocab, top_k.clamp(max=vocab)).to(torch.int64)
    kth = ranked.gather(1, count[:, None] - 1)
    scale = torch.where(temperature > 0, temperature, 1.0)[:, None]
    mass = ((ranked - ranked[:, :1]) / scale).double().exp()
    mass = mass.masked_fill(ranked < kth, 0.0)
    before = mass.cumsum(dim=1) - mass
    wanted = top_p.double()[:, None] * mass.sum(dim=1, keepdim=True)
    needed = (before < wanted).sum(dim=1, keepdim=True).clamp(min=1)
    nucleus = ranked.gather(1, needed - 1)
    return torch.where(top_p[:, None] < 1.0, torch.maximum(nucleus, kth), kth)[:, 0]


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3 on int32 bit patterns."""
    x = (x ^ _shift(x, 16)) * _MUL_A
    x = (x ^ _shift(x, 13)) * _MUL_B
    return x ^ _shift(x, 16)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32 bit patterns."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _low(x: Tensor) -> Tensor:
    """The low 32 bits of int64 values, as int32 bit patterns."""
    x = x & 0xFFFFFFFF
    return torch.where(x >= 1 << 31, x - (1 << 32), x).to(torch.int32)
