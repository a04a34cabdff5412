"""Where a sequence has its last tokens once more: what followed there is likely to follow again.

Everything is on the device, where the tokens are: a step looks up its own drafts, and the host is
not asked. This module knows tokens, not requests.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from millrace.kernels.dispatch import op

_LOW = (1 << 32) - 1


class Match(NamedTuple):
    """length: int64 [R], tokens that are the same; 0: none. next: int64 [R], the position behind
    them."""

    length: Tensor
    next: Tensor


@op
def longest_match(
    tokens: Tensor, slots: Tensor, ends: Tensor, longest: int, context: int
) -> Tensor:
    """The earlier place of each row whose last tokens are the row's own, for the most tokens.

    tokens: int64 [N, L], sequences by slot. slots, ends: int64 [R]; of a row tokens 0 .. end - 1
    are known, and no others are read. longest: more tokens are not compared. context: no end is
    greater. Of equally long matches the last one wins. Returns int64 [R]: tokens that are the same
    in the high word, the position behind them in the low word; 0 where there is no match.
    """
    found = torch.zeros_like(ends)
    if context < 2 or not slots.numel():
        return found
    known = tokens[slots, :context]
    last = known.gather(1, (ends - 1)[:, None])
    place = torch.arange(context - 1, device=tokens.device)
    same = (known[:, :-1] == last) & (place < (ends - 1)[:, None])
    row, at = same.nonzero(as_tuple=True)
    length, alive = torch.ones_like(row), torch.ones_like(row, dtype=torch.bool)
    for back in range(1, longest):
        wanted = (ends[row] - 1 - back).clamp(min=0)
        alive = alive & (at >= back) & (known[row, (at - back).clamp(min=0)] == known[row, wanted])
        if not bool(alive.any()):
            break
        length = length + alive
    return found.scatter_reduce_(0, row, (length << 32) | (at + 1), "amax")


def split_match(found: Tensor) -> Match:
    """The parts of a result of `longest_match`."""
    return Match(found >> 32, found & _LOW)


def continuation(tokens: Tensor, slots: Tensor, ends: Tensor, match: Match, count: int) -> Tensor:
    """The `count` tokens behind each match, which are drafts: int64 [R, count].

    Where the match ends near the end of what is known, its tokens come again from the front: a
    match behind which p tokens are known is a period of p. Rows without a match get any tokens.
    """
    period = (ends - match.next).clamp(min=1)
    ahead = torch.arange(count, device=tokens.device)
    return tokens[slots[:, None], match.next[:, None] + ahead % period[:, None]]
