"""How one step's prompt tokens are shared out between prompts. Pure numbers: it knows no request.

Prompts of one priority are offered tokens in two rounds, each in the order of their rank:

1. Up to half of the budget goes to prompts that fit into what is left of that half. They are
   computed whole, so a short prompt does not wait behind long ones.
2. The rest goes to the others in turn. A *long* prompt (more than the threshold is left of it) gets
   at most the threshold a step. In a step that has computed prompts in round 1 it gets a quarter
   of that, so that the step, and with it their first tokens, comes soon.

A piece that does not end its prompt is cut so that all tokens of the step fill a bucket. So the
first prompt in turn gets at least `least_piece` tokens of every step, or all that is left of it,
however many short prompts come.
"""

from __future__ import annotations

from millrace.config import bucket_above, bucket_below
from millrace.engine.intake import Limits

SHORTS = 2  # one part in so many is for prompts that fit whole
QUICK = 4  # a long prompt's part, in a step that others' first tokens wait for


class PromptBudget:
    """What a step may still compute of prompts.

    tokens: for prompts. beside: tokens of the step's decode rows.
    """

    def __init__(self, limits: Limits, tokens: int, beside: int) -> None:
        self.left = tokens
        self._limits = limits
        self._total = beside  # tokens of the step so far
        self._for_shorts = 0
        self._quick = False
        self._partial = 0  # prompts that the step computes a piece of
        self._long = 0

    def open(self) -> None:
        """The prompts of one priority follow."""
        self._for_shorts = self.left // SHORTS

    def whole(self, missing: int) -> int:
        """Round 1: all `missing` tokens of a prompt, or 0."""
        return missing if missing <= self._for_shorts else 0

    def in_turn(self, missing: int) -> int:
        """Round 2: how many of a prompt's `missing` tokens the step computes; 0: none now."""
        limits, most = self._limits, self.left
        if self._is_long(missing):
            if _reached(self._long, limits.max_long_partial_prefills):
                return 0
            threshold = limits.long_prefill_token_threshold
            most = min(most, max(1, threshold // QUICK) if self._quick else threshold)
        if missing <= most:
            return missing
        if _reached(self._partial, limits.max_num_partial_prefills):
            return 0
        return _landed(most, self._total)

    def spend_whole(self, computed: int) -> None:
        """A prompt of round 1 takes its tokens; fewer, where it stops for a snapshot."""
        self._for_shorts -= computed
        self._quick = True
        self._spend(computed)

    def spend_in_turn(self, missing: int, offered: int, computed: int) -> None:
        """A prompt of round 2 takes what it was offered; less, where it stops for a snapshot."""
        self._long += self._is_long(missing)
        self._partial += offered < missing
        self._spend(computed)

    def _spend(self, computed: int) -> None:
        self.left -= computed
        self._total += computed

    def _is_long(self, missing: int) -> bool:
        return 0 < self._limits.long_prefill_token_threshold < missing


def step_tokens(limits: Limits, beside: int, missing: int) -> int:
    """Prompt tokens of a step with `beside` tokens of decode rows.

    Beside decode rows the `missing` tokens of all prompts are spread evenly over as few steps as
    they need, so that a stream's gaps are alike.
    """
    most = limits.max_num_batched_tokens - beside
    if not beside:
        return most
    if limits.mixed_prefill_tokens:
        most = min(most, limits.mixed_prefill_tokens)
    most = _landed(most, beside)
    if missing <= most:
        return most
    steps = -(-missing // most)
    return min(most, bucket_above(beside - (-missing // steps)) - beside)


def least_piece(limits: Limits, tokens: int) -> int:
    """What the first prompt in turn gets at least, of a step with `tokens` for prompts.

    One stop for a snapshot, or the prompt's end, may make it less.
    """
    piece = tokens - tokens // SHORTS
    if threshold := limits.long_prefill_token_threshold:
        piece = min(piece, max(1, threshold // QUICK))
    return -(-piece // 2)


def _reached(count: int, limit: int) -> bool:
    return 0 < limit <= count


def _landed(tokens: int, beside: int) -> int:
    """`tokens` cut so that they fill a bucket with those beside them; at most half is cut off."""
    landed = bucket_below(beside + tokens) - beside
    return landed if 2 * landed >= tokens else tokens
