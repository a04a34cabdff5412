"""What a step consists of, as far as its cost depends on it: counts of rows and tokens.

Every field may be a float, or a numpy array with one entry for each of several steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StepShape:
    """Counts of one step.

    decode_rows: sequences that decode. decode_tokens: their tokens, with the drafts that are
    verified. decode_context: tokens in the KV cache of these rows, summed. prompts: pieces of
    prompts. prompt_tokens: their tokens. prompt_context: tokens in the KV cache before each piece,
    summed. prompt_attention: pairs of a prompt token and a token that it attends to, summed: for
    each piece count x (start + (count + 1) / 2). sampled_rows: sequences that get new tokens: all
    decode rows, and pieces that end a prompt.
    """

    decode_rows: Any = 0.0
    decode_tokens: Any = 0.0
    decode_context: Any = 0.0
    prompts: Any = 0.0
    prompt_tokens: Any = 0.0
    prompt_context: Any = 0.0
    prompt_attention: Any = 0.0
    sampled_rows: Any = 0.0

    @classmethod
    def of(
        cls,
        rows: float = 0.0,
        width: float = 1.0,
        context: float = 0.0,
        prompts: float = 0.0,
        length: float = 0.0,
        start: float = 0.0,
        last: float = 1.0,
    ) -> StepShape:
        """`rows` decode rows of `width` tokens with `context` tokens each, beside `prompts` pieces
        of `length` tokens that begin at `start`; last: the share of them that end their prompt."""
        return cls(
            decode_rows=rows,
            decode_tokens=rows * width,
            decode_context=rows * context,
            prompts=prompts,
            prompt_tokens=prompts * length,
            prompt_context=prompts * start,
            prompt_attention=prompts * length * (start + (length + 1) / 2),
            sampled_rows=rows + prompts * last,
        )

    @property
    def tokens(self) -> Any:
        """All tokens that go through the layers."""
        return self.decode_tokens + self.prompt_tokens

    @property
    def scored_tokens(self) -> Any:
        """Tokens that the output head sees: those of decode rows, and the ends of prompts."""
        return self.decode_tokens + self.sampled_rows - self.decode_rows
