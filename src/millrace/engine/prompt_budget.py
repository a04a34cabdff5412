"""How a step's prompt tokens are shared between prompts. It knows numbers only, no request.

Prompts of one priority are planned in two rounds, each in the order of their rank:

1. Up to half of the budget is for prompts that fit into the rest of that half. They are computed
   at once, so a short prompt does not wait behind long ones.
2. The rest of the budget goes to the other prompts in turn. A *long* prompt has more tokens left
   than the threshold. It gets at most the threshold in one step, and the last chunks of prompts
   that were split count towards that, so that all steps are about as large. In a step that
   computed prompts in round 1 it is a quarter of the threshold, so that such a step, and with it
   their first token, ends soon; in the steps that follow it half, since more such prompts may come.

A chunk that does not end its prompt is cut so that all tokens of the step fill a bucket. So
however many short prompts come, the first prompt of round 2 gets at least `min_chunk` tokens.
"""

from __future__ import annotations

from millrace.config import bucket_above, bucket_below
from millrace.protocol import Limits

ROUND_1_DIVISOR = 2  # round 1 has the step's prompt tokens divided by this
SMALL_STEP_DIVISOR = 4  # a long prompt behind round 1: the threshold divided by this
FOLLOWING_DIVISOR = 2  # and in the steps that follow
FOLLOWING_STEPS = 16


class PromptBudget:
    """The prompt tokens that a step may still compute.

    tokens: the step's prompt tokens. decode_tokens: the tokens of its decode rows. following: one
    of the last `FOLLOWING_STEPS` steps computed a prompt in round 1.
    """

    def __init__(
        self, limits: Limits, tokens: int, decode_tokens: int, following: bool = False
    ) -> None:
        self.left = tokens
        self.whole_prompts = 0  # that round 1 has computed
        self._limits = limits
        self._planned = decode_tokens  # tokens of the step so far
        self._round_1_left = 0
        self._long_divisor = FOLLOWING_DIVISOR if following else 1
        self._partial = 0  # prompts that the step computes a part of
        self._long = 0  # long ones among the prompts of round 2
        self._long_tokens = 0  # of long and of split prompts

    def start_priority(self) -> None:
        """Begin with the prompts of the next priority."""
        self._round_1_left = self.left // ROUND_1_DIVISOR

    def whole(self, missing: int) -> int:
        """Round 1: tokens for a prompt with `missing` tokens left: all of them, or 0."""
        return missing if missing <= self._round_1_left else 0

    def chunk(self, missing: int, split: bool = False) -> int:
        """Round 2: tokens for a prompt with `missing` tokens left; may be 0.

        split: an earlier step has computed a part of it.
        """
        limits, most = self._limits, self.left
        long = self._is_long(missing)
        if long and _reached(self._long, limits.max_long_partial_prefills):
            return 0
        if long or split:
            most = min(most, self._left_for_long())
        if missing <= most:
            return missing
        if most == 0 or _reached(self._partial, limits.max_num_partial_prefills):
            return 0
        return _cut_to_bucket(most, self._planned)

    def _left_for_long(self) -> int:
        """The most tokens that the step may still compute of one long or split prompt."""
        threshold = self._limits.long_prefill_token_threshold
        if not threshold:
            return self.left
        each = max(1, threshold // self._long_divisor)
        prompts = self._limits.max_long_partial_prefills
        return max(0, min(each, each * prompts - self._long_tokens)) if prompts else each

    def spend_whole(self, computed: int) -> None:
        """A prompt of round 1 is planned. computed: fewer than all of it at a snapshot boundary."""
        self._round_1_left -= computed
        self.whole_prompts += 1
        self._long_divisor = SMALL_STEP_DIVISOR
        self._spend(computed)

    def spend_chunk(self, missing: int, chunk: int, computed: int, split: bool = False) -> None:
        """A prompt of round 2 is planned. computed: fewer than `chunk` at a snapshot boundary."""
        long = self._is_long(missing)
        self._long += long
        self._long_tokens += computed if long or split else 0
        self._partial += chunk < missing
        self._spend(computed)

    def _spend(self, computed: int) -> None:
        self.left -= computed
        self._planned += computed

    def _is_long(self, missing: int) -> bool:
        return 0 < self._limits.long_prefill_token_threshold < missing


def step_tokens(limits: Limits, decode_tokens: int, missing: int) -> int:
    """Prompt tokens of a step that has `decode_tokens` tokens of decode rows.

    missing: tokens left of all prompts. Beside decode rows they are spread evenly over as few
    steps as they need, so that the gaps between the tokens of a stream are even.
    """
    most = limits.max_num_batched_tokens - decode_tokens
    if not decode_tokens:
        return most
    if limits.mixed_prefill_tokens:
        most = min(most, limits.mixed_prefill_tokens)
    most = _cut_to_bucket(most, decode_tokens)
    if missing <= most:
        return most
    steps = -(-missing // most)
    even = -(-missing // steps)
    return min(most, bucket_above(decode_tokens + even) - decode_tokens)


def min_chunk(limits: Limits, tokens: int) -> int:
    """Tokens that the first prompt of round 2 gets at least, in a step with `tokens` for prompts.

    It gets fewer only where its prompt ends or saves a snapshot.
    """
    most = tokens - tokens // ROUND_1_DIVISOR
    if threshold := limits.long_prefill_token_threshold:
        most = min(most, max(1, threshold // SMALL_STEP_DIVISOR))
    return -(-most // 2)


def _reached(count: int, limit: int) -> bool:
    return 0 < limit <= count


def _cut_to_bucket(tokens: int, planned: int) -> int:
    """`tokens`, cut so that together with those planned they fill a bucket.

    If that would cut off more than half of them, they stay as they are.
    """
    cut = bucket_below(planned + tokens) - planned
    return cut if 2 * cut >= tokens else tokens
