"""Grammars that outputs must match: which tokens may come next, for every candidate of a step.

llguidance does the grammar work, in compiled code that releases the interpreter; here is only which
matcher stands where. Building a matcher (and, once, the tokenizer's trie) takes up to a second, so
it happens on a thread of its own while the engine goes on. This module knows no scheduler and no
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from millrace.common.optional import available
from millrace.errors import ConfigError, RequestError
from millrace.protocol import AddRequest, Masks, StepPlan

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

_EVERYTHING = -1  # an int32 of ones


class Follower:
    """One request's place in its grammar.

    after: the token behind which the grammar starts; None once it has been seen.
    drafts: the tokens that wait for verification behind the last known one.
    """

    def __init__(self, matcher: LLMatcher, after: int | None) -> None:
        self.matcher = matcher
        self.after = after
        self.drafts: list[int] = []

    def advance(self, tokens: Sequence[int]) -> None:
        """Take tokens that the request has been given."""
        for token in tokens:
            if self.after is not None:
                self.after = None if token == self.after else self.after
            elif not self.matcher.is_stopped():  # else only an end can follow, which it rejects
                self.matcher.consume_token(token)

    def start(self, candidates: int) -> int:
        """The first of the coming `candidates` that the grammar governs; `candidates` if none."""
        if self.after is None:
            return 0
        seen = self.drafts[: candidates - 1]
        return seen.index(self.after) + 1 if self.after in seen else candidates


class Grammars:
    """The followers of all requests that have a grammar.

    tokenizer: a `tokenizer.json`. vocab_size: columns of the model's logits. eos_ids: the tokens
    that end an output. width: candidates of a decode row.
    """

    def __init__(
        self, tokenizer: Path, vocab_size: int, eos_ids: Sequence[int], width: int
    ) -> None:
        self._path = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._width = width
        self._followers: dict[str, Follower] = {}
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def prepare(self, request: AddRequest) -> Future[Follower]:
        """Build a request's follower on another thread. It fails with RequestError."""
        return self._threads.submit(self._build, request)

    def enter(self, request_id: str, follower: Follower) -> None:
        """The request goes to the scheduler."""
        self._followers[request_id] = follower

    def leave(self, request_id: str) -> None:
        """The request has ended."""
        self._followers.pop(request_id, None)

    def advance(self, request_id: str, tokens: Sequence[int], drafts: list[int]) -> None:
        """A step brought tokens, and drafts behind them."""
        if (follower := self._followers.get(request_id)) and tokens:
            follower.advance(tokens)
            follower.drafts = drafts

    def failure(self, request_id: str) -> str | None:
        """What is wrong with a request's output, if it has left its grammar."""
        follower = self._followers.get(request_id)
        if follower is None or not follower.matcher.is_error():
            return None
        return _reason(follower.matcher)

    def masks(self, plan: StepPlan, rows: Sequence[tuple[int, str]]) -> Masks:
        """For the sampled rows (row, request id) of a plan, the tokens that may come."""
        widths = [self._width if row < len(plan.decode) else 1 for row, _ in rows]
        table: NDArray[np.int32] = np.full(
            (sum(widths), -(-self._vocab_size // 32)), _EVERYTHING, dtype=np.int32
        )
        alone, ahead = [], []
        at = 0
        for (_, request_id), width in zip(rows, widths, strict=True):
            follower = self._followers.get(request_id)
            first = width if follower is None else follower.start(width)
            if follower is not None and first < width:
                drafts = follower.drafts[first : width - 1]
                if drafts:
                    ahead.append((follower.matcher, at + first, drafts))
                else:
                    alone.append((follower.matcher, at + first))
            at += width
        self._fill(table, alone, ahead)
        return Masks(plan.step, [row for row, _ in rows], table.tobytes())

    def _fill(
        self,
        table: NDArray[np.int32],
        alone: list[tuple[LLMatcher, int]],
        ahead: list[tuple[LLMatcher, int, list[int]]],
    ) -> None:
        """Each matcher's mask into its row; in `ahead` also those behind each of its drafts."""
        from llguidance import numpy as fill

        if alone:
            fill.fill_next_token_bitmask_par(self._executor, alone, table)
        if ahead:
            fill.fill_next_token_bitmask_par_with_draft_tokens(self._executor, ahead, table)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _build(self, request: AddRequest) -> Follower:
        if not available("llguidance"):
            raise RequestError(
                "structured outputs need llguidance, which the server cannot import; see its log",
                param="structured_outputs",
            )
        from llguidance import LLMatcher

        assert request.grammar is not None
        matcher = LLMatcher(self._tokenizer, request.grammar.source)
        if matcher.is_error():
            raise RequestError(f"grammar: {_reason(matcher)}", param="structured_outputs")
        follower = Follower(matcher, request.grammar.after)
        follower.advance(request.resume)
        if matcher.is_error():
            raise RequestError(
                f"resume_token_ids do not match the grammar: {_reason(matcher)}",
                param="resume_token_ids",
            )
        return follower

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if not self._path.exists():
            raise ConfigError(f"structured outputs need {self._path}")
        return LLTokenizer(
            self._path.read_text(), n_vocab=self._vocab_size, eos_token=self._eos_ids
        )

    @cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor

        return LLExecutor()


def _reason(matcher: LLMatcher) -> str:
    """The first line of what a matcher says is wrong; the rest is its inner state."""
    return matcher.get_error().split("\n", 1)[0]
