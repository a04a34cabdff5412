"""`millrace.engine.prompt_budget` for many engines at once: the same numbers, as arrays.

One difference: prompts of one priority only. A test compares both, number by number.
"""

from __future__ import annotations

import numpy as np

from millrace.config import SMALL_BUCKETS, TILE
from millrace.engine.prompt_budget import (
    FOLLOWING_DIVISOR,
    ROUND_1_DIVISOR,
    SMALL_STEP_DIVISOR,
)
from millrace.protocol import Limits


class PromptBudgets:
    """The prompt tokens that the steps of some engines may still compute, one row each."""

    def __init__(
        self, limits: Limits, tokens: np.ndarray, decode_tokens: np.ndarray, following: np.ndarray
    ) -> None:
        self._limits = limits
        self.left = tokens.copy()
        self.whole_prompts = np.zeros_like(tokens)
        self._planned = decode_tokens.copy()
        self._round_1_left = tokens // ROUND_1_DIVISOR
        self._divisor = np.where(following, FOLLOWING_DIVISOR, 1)
        self._long = np.zeros_like(tokens)
        self._long_tokens = np.zeros_like(tokens)
        self._partial = np.zeros_like(tokens)

    def round_1_left(self, at: np.ndarray) -> np.ndarray:
        """Tokens that these rows have for whole prompts."""
        found: np.ndarray = self._round_1_left[at]
        return found

    def whole(self, at: np.ndarray, missing: np.ndarray) -> np.ndarray:
        """Round 1: tokens for a prompt in each of the rows `at`: all that miss, or 0."""
        return np.where(missing <= self._round_1_left[at], missing, 0)

    def spend_whole(self, at: np.ndarray, computed: np.ndarray) -> None:
        """Prompts of round 1 are planned, one in each of these rows."""
        self._round_1_left[at] -= computed
        self.whole_prompts[at] += 1
        self._divisor[at] = SMALL_STEP_DIVISOR
        self.left[at] -= computed
        self._planned[at] += computed

    def chunk(self, at: np.ndarray, missing: np.ndarray, split: np.ndarray) -> np.ndarray:
        """Round 2: tokens for a prompt in each of these rows; may be 0."""
        limits, left = self._limits, self.left[at]
        long = self._is_long(missing)
        narrow = long | split
        most = np.where(narrow, np.minimum(left, self._left_for_long(at)), left)
        chunk = np.where(missing <= most, missing, cut_to_bucket(most, self._planned[at]))
        none = (most <= 0) & (missing > most)
        if limits.max_long_partial_prefills:
            none |= long & (self._long[at] >= limits.max_long_partial_prefills)
        if limits.max_num_partial_prefills:
            none |= (missing > most) & (self._partial[at] >= limits.max_num_partial_prefills)
        return np.where(none, 0, chunk)

    def spend_chunk(
        self,
        at: np.ndarray,
        missing: np.ndarray,
        chunk: np.ndarray,
        computed: np.ndarray,
        split: np.ndarray,
    ) -> None:
        """Prompts of round 2 are planned, one in each of these rows."""
        long = self._is_long(missing)
        self._long[at] += long
        self._long_tokens[at] += np.where(long | split, computed, 0)
        self._partial[at] += chunk < missing
        self.left[at] -= computed
        self._planned[at] += computed

    def _left_for_long(self, at: np.ndarray) -> np.ndarray:
        threshold = self._limits.long_prefill_token_threshold
        left: np.ndarray = self.left[at]
        if not threshold:
            return left
        each: np.ndarray = np.maximum(1, threshold // self._divisor[at])
        prompts = self._limits.max_long_partial_prefills
        if prompts:
            each = np.maximum(0, np.minimum(each, each * prompts - self._long_tokens[at]))
        return each

    def _is_long(self, missing: np.ndarray) -> np.ndarray:
        threshold = self._limits.long_prefill_token_threshold
        found: np.ndarray = (missing > threshold) & (threshold > 0)
        return found


def step_tokens(limits: Limits, decode_tokens: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Prompt tokens of steps with so many tokens of decode rows and so many missing."""
    alone = limits.max_num_batched_tokens - decode_tokens
    most = alone
    if limits.mixed_prefill_tokens:
        most = np.minimum(most, limits.mixed_prefill_tokens)
    most = cut_to_bucket(most, decode_tokens)
    steps = -(-missing // np.maximum(most, 1))
    even = -(-missing // np.maximum(steps, 1))
    spread = np.minimum(most, bucket_above(decode_tokens + even) - decode_tokens)
    mixed = np.where(missing <= most, most, spread)
    return np.where(decode_tokens > 0, mixed, alone)


def cut_to_bucket(tokens: np.ndarray, planned: np.ndarray) -> np.ndarray:
    """`tokens`, cut so that with those planned they fill a bucket, unless half would be lost."""
    cut = bucket_below(planned + tokens) - planned
    return np.where(2 * cut >= tokens, cut, tokens)


_SMALL = np.array((0, *SMALL_BUCKETS))


def bucket_below(tokens: np.ndarray) -> np.ndarray:
    """The largest bucket of at most `tokens`, each."""
    small = _SMALL[np.clip(np.searchsorted(_SMALL, tokens, side="right") - 1, 0, None)]
    return np.where(tokens >= TILE, tokens // TILE * TILE, small)


def bucket_above(tokens: np.ndarray) -> np.ndarray:
    """The least bucket that `tokens` fit into, each."""
    at = np.searchsorted(_SMALL[1:], tokens, side="left")
    small = np.append(_SMALL[1:], 0)[at]
    return np.where(at < len(_SMALL) - 1, small, -(-tokens // TILE) * TILE)
