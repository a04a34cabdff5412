"""What changes logits before a token is drawn, and what reports them: plain tensor arithmetic.

Penalties need the tokens before a position; those lie on the tape, drafts included, so nothing is
counted from step to step. The formulas are vLLM's and OpenAI's. This module knows no request.
"""

from __future__ import annotations

import torch
from torch import Tensor


def penalise(
    logits: Tensor,
    tapes: Tensor,
    ends: Tensor,
    prompt_len: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Logits under the three penalties.

    logits: float32 [R, V]. tapes: int64 [R, L], each row's tokens by position. ends: int64 [R]; the
    row's context is tapes[:end], its first prompt_len (int64 [R]) tokens the prompt. repetition:
    divides positive and multiplies negative logits of any token of the context; presence and
    frequency: taken off once, and for each occurrence, for generated tokens. All float32 [R].
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
    """How often each token stands at a counted place: float32 of logits' shape."""
    return torch.zeros_like(logits).scatter_add_(1, tapes, counted.to(logits.dtype))


def drop_improbable(logits: Tensor, min_p: Tensor, temperature: Tensor) -> Tensor:
    """-inf for tokens less than min_p as probable as the likeliest, at the row's temperature.

    logits: float32 [R, V]; min_p in [0, 1] and temperature: float32 [R].
    """
    floor = logits.amax(1) + torch.log(min_p) * temperature
    return logits.masked_fill(logits < floor[:, None], -torch.inf)


def apply_masks(logits: Tensor, words: Tensor) -> Tensor:
    """-inf where a token's bit is 0. logits: float32 [R, V]; words: int32 [R, ceil(V / 32)]."""
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    allowed = (words[:, :, None] >> bits) & 1
    return logits.masked_fill(allowed.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def completes(tapes: Tensor, ends: Tensor, sequences: Tensor) -> Tensor:
    """Whether the sequence's last token, put at `end`, would complete the sequence: bool [R].

    tapes: int64 [R, L]; ends: int64 [R]; sequences: int64 [R, M], right-aligned, -1 in front.
    """
    before = sequences[:, :-1]
    length = before.shape[1]
    places = ends[:, None] - length + torch.arange(length, device=tapes.device)
    found = tapes.gather(1, places.clamp(min=0))
    # A place before the sequence's start would match only padding.
    return ((before < 0) | ((places >= 0) & (found == before))).all(1)


def close_reasoning(
    logits: Tensor, rows: Tensor, tapes: Tensor, ends: Tensor, begin: Tensor, limit: Tensor,
    token: Tensor,
) -> None:  # fmt: skip
    """Leave nothing but `token` to those of the rows where it is due: it would stand at `limit` or
    behind it, and stands nowhere from `begin` on. In place: no tensor of a step is larger.

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


def token_logprobs(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens' log-probabilities and ranks, with the `top` likeliest of each row.

    logits: float32 [R, V]; tokens: int64 [R], -1 counts as 0. Returns ids int64 [R, 1 + top], their
    log-probabilities float32 [R, 1 + top] (the token first, then the likeliest in order) and the
    token's rank, int64 [R], 1 for the likeliest.
    """
    tokens = tokens.clamp(min=0)[:, None]
    own = logits.gather(1, tokens)
    rank = (logits > own).sum(1) + 1
    best = torch.topk(logits, top, dim=1)
    ids = torch.cat([tokens, best.indices], dim=1)
    values = torch.cat([own, best.values], dim=1) - logits.logsumexp(1, keepdim=True)
    return ids, values, rank
