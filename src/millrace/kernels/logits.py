"""What changes logits before a token is sampled, and what reports them: plain tensor arithmetic.

Penalties need the tokens before a position. These are on the tape, drafts included, so nothing is
counted from step to step. The formulas are those of vLLM and OpenAI. This module knows no request.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.kernels.dispatch import by_token


def apply_penalties(
    logits: Tensor,
    tapes: Tensor,
    ends: Tensor,
    prompt_len: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Apply the three penalties to logits.

    logits: float32 [R, V]. tapes: int64 [R, L], each row's tokens by position. ends: int64 [R]; the
    row's context is tapes[:end], its first prompt_len (int64 [R]) tokens the prompt. repetition:
    divides positive and multiplies negative logits of every token in the context. presence,
    frequency: subtracted once, and once for each occurrence, from generated tokens. All float32
    [R].
    """
    place = torch.arange(tapes.shape[1], device=tapes.device)
    known = place < ends[:, None]
    generated = known & (place >= prompt_len[:, None])
    seen = _counts(logits, tapes, known) > 0
    counts = _counts(logits, tapes, generated)
    factor = torch.where(logits > 0, 1.0 / repetition[:, None], repetition[:, None])
    logits = torch.where(seen, logits * factor, logits)
    return logits - frequency[:, None] * counts - presence[:, None] * (counts > 0)


def _counts(logits: Tensor, tapes: Tensor, counted: Tensor) -> Tensor:
    """How often each token occurs at counted positions: float32, shape of logits."""
    return torch.zeros_like(logits).scatter_add_(1, tapes, counted.to(logits.dtype))


@by_token("logits", "min_p", "temperature")
def apply_min_p(logits: Tensor, min_p: Tensor, temperature: Tensor) -> Tensor:
    """-inf for tokens with less than min_p times the highest probability, at the row's temperature.

    logits: float32 [R, V]; min_p in [0, 1] and temperature: float32 [R].
    """
    floor = logits.amax(1) + torch.log(min_p) * temperature
    return logits.masked_fill(logits < floor[:, None], -torch.inf)


def apply_masks(logits: Tensor, words: Tensor) -> Tensor:
    """Set logits to -inf where a token's bit is 0. logits: float32 [R, V]; words: int32 [R, ceil(V
    / 32)]."""
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    allowed = (words[:, :, None] >> bits) & 1
    return logits.masked_fill(allowed.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def completes_sequence(tapes: Tensor, ends: Tensor, sequences: Tensor) -> Tensor:
    """Whether the last token of the sequence would complete it at position `end`: bool [R].

    tapes: int64 [R, L]; ends: int64 [R]; sequences: int64 [R, M], right-aligned, -1 in front.
    """
    before = sequences[:, :-1]
    length = before.shape[1]
    places = ends[:, None] - length + torch.arange(length, device=tapes.device)
    found = tapes.gather(1, places.clamp(min=0))
    # A position below 0 may match padding only.
    return ((before < 0) | ((places >= 0) & (found == before))).all(1)


def force_reasoning_end(
    logits: Tensor, rows: Tensor, tapes: Tensor, ends: Tensor, begin: Tensor, limit: Tensor,
    token: Tensor,
) -> None:  # fmt: skip
    """Allow only `token` in the rows where it is due: the position is `limit` or later, and the
    token has not occurred from `begin` on. In place, because logits are a step's largest tensor.

    logits: float32 [C, V]; rows: int64 [R], none twice. tapes: int64 [R, L], known up to ends; the
    others int64 [R].
    """
    places = torch.arange(tapes.shape[1], device=tapes.device)
    written = (places >= begin[:, None]) & (places < ends[:, None])
    closed = ((tapes == token[:, None]) & written).any(1)
    due = (ends >= limit) & ~closed
    every = torch.zeros_like(logits[:, 0], dtype=torch.bool).index_put_((rows,), due)
    logits.masked_fill_(every[:, None], -torch.inf)
    logits[rows, token] = torch.where(due, 0.0, logits[rows, token])


@by_token("logits", "tokens")
def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities float32 [R, K] of tokens (int64 [R, K]). logits: float32 [R, V]."""
    return logits.gather(1, tokens) - logits.logsumexp(1, keepdim=True)


@by_token("logits", "tokens")
def token_logprobs(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and ranks of the tokens, and the `top` most probable tokens of each row.

    logits: float32 [R, V]; tokens: int64 [R], -1 counts as 0. Returns ids int64 [R, 1 + top], their
    log-probabilities float32 [R, 1 + top] (the token first, then the most probable in order) and
    the token's rank, int64 [R], from 1.
    """
    tokens = tokens.clamp(min=0)[:, None]
    own = logits.gather(1, tokens)
    rank = (logits > own).sum(1) + 1
    best = torch.topk(logits, top, dim=1)
    ids = torch.cat([tokens, best.indices], dim=1)
    values = torch.cat([own, best.values], dim=1) - logits.logsumexp(1, keepdim=True)
    return ids, values, rank
