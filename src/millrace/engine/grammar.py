"""Grammars that outputs must match: which tokens are allowed next, for every candidate of a step.

llguidance matches grammars in compiled code, which releases the interpreter lock. This module keeps
one matcher for each request. To build a matcher (and once, the tokenizer's trie) takes up to a
second, so it is done on another thread while the engine goes on. This module knows no scheduler and
no device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from millrace.common.native_stack import COMPILE_STACK, run_on_stack
from millrace.common.optional import available
from millrace.errors import RequestError, is_library_failure
from millrace.protocol import AddRequest, Masks, StepPlan

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

_EVERYTHING = -1  # an int32 of ones
SLOW_SECONDS = 0.5  # for one mask; all streams wait for it
_TRIED_TOKENS = 8
_TOO_SLOW = (
    "it takes too long to find the tokens that may come next; write it with fewer alternatives "
    "that begin or end alike"
)


class GrammarState:
    """How far one request's output has come in its grammar.

    start_after: the token that the grammar starts behind; None once it has been seen.
    drafts: draft tokens behind the last known token, not verified yet.
    """

    def __init__(self, matcher: LLMatcher, start_after: int | None) -> None:
        self.matcher = matcher
        self.start_after = start_after
        self.drafts: list[int] = []
        self.slow = False

    def advance(self, tokens: Sequence[int]) -> None:
        """Advance by tokens of the output."""
        with self.timed():
            self.consume(tokens)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around work of this grammar alone: `slow` is set if it takes too long."""
        began = monotonic()
        yield
        self.slow = self.slow or monotonic() - began > SLOW_SECONDS

    def consume(self, tokens: Sequence[int]) -> None:
        """As `advance`, for any number of tokens: it may take its time."""
        for token in tokens:
            if self.start_after is not None:
                self.start_after = None if token == self.start_after else self.start_after
            elif not self.matcher.is_stopped():  # a finished grammar rejects the end token
                self.matcher.consume_token(token)

    def start(self, candidates: int) -> int:
        """Index of the first of the next `candidates` that the grammar masks; `candidates` if
        none."""
        if self.start_after is None:
            return 0
        seen = self.drafts[: candidates - 1]
        return seen.index(self.start_after) + 1 if self.start_after in seen else candidates


class Grammars:
    """The grammar states of all requests that have a grammar.

    tokenizer: path of a `tokenizer.json`, None if it may not be read. vocab_size: columns of the
    model's logits. eos_ids: the tokens that end an output. width: candidates of a decode row, at
    most.
    """

    def __init__(
        self, tokenizer: Path | None, vocab_size: int, eos_ids: Sequence[int], width: int
    ) -> None:
        self._path = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._width = width
        self.states: dict[str, GrammarState] = {}
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._one_by_one = False  # the masks of the next step

    def compile(self, request: AddRequest) -> Future[GrammarState]:
        """Build a request's state on another thread. The future may raise RequestError."""
        return self._threads.submit(self._build, request)

    def add(self, request_id: str, state: GrammarState) -> None:
        """Keep the state of a request that the scheduler has accepted."""
        self.states[request_id] = state

    def remove(self, request_id: str) -> None:
        """Drop the state of a request that has ended; unknown ids are allowed."""
        self.states.pop(request_id, None)

    def advance(self, request_id: str, tokens: Sequence[int], drafts: list[int]) -> None:
        """A step brought these tokens, and drafts for the next step."""
        if (state := self.states.get(request_id)) and tokens:
            state.advance(tokens)
            state.drafts = drafts

    def failure(self, request_id: str) -> str | None:
        """Why a request's output does not match its grammar; None if it does."""
        state = self.states.get(request_id)
        if state is not None and state.slow:
            return _TOO_SLOW
        if state is None or not state.matcher.is_error():
            return None
        return _reason(state.matcher)

    def masks(self, plan: StepPlan, rows: Sequence[tuple[int, str]]) -> Masks:
        """Bit masks of the allowed tokens, for the sampled rows (row, request id) of a plan."""
        most = self._width if plan.drafts < 0 else plan.drafts + 1
        widths = [most if row < len(plan.decode) else 1 for row, _ in rows]
        table: NDArray[np.int32] = np.full(
            (sum(widths), -(-self._vocab_size // 32)), _EVERYTHING, dtype=np.int32
        )
        work: list[tuple[GrammarState, int, list[int]]] = []
        at = 0
        for (_, request_id), width in zip(rows, widths, strict=True):
            state = self.states.get(request_id)
            first = width if state is None else state.start(width)
            if state is not None and first < width:
                work.append((state, at + first, state.drafts[first : width - 1]))
            at += width
        self._fill_timed(table, work)
        return Masks(plan.step, [row for row, _ in rows], table.tobytes())

    def _fill_timed(
        self, table: NDArray[np.int32], work: list[tuple[GrammarState, int, list[int]]]
    ) -> None:
        """Fill all rows at once; one by one if that took too long in the last step, to learn which
        grammar it is. Its request ends with an error."""
        work = [one for one in work if not one[0].slow]
        began = monotonic()
        if self._one_by_one or len(work) == 1:
            for one in work:
                with one[0].timed():
                    self._fill(table, [one])
        elif work:
            self._fill(table, work)
        self._one_by_one = monotonic() - began > SLOW_SECONDS

    def _fill(
        self, table: NDArray[np.int32], work: list[tuple[GrammarState, int, list[int]]]
    ) -> None:
        """Write each matcher's mask into its row; with drafts, also the masks behind each draft."""
        from llguidance import numpy as fill

        single_masks = [(state.matcher, row) for state, row, drafts in work if not drafts]
        draft_masks = [(state.matcher, row, drafts) for state, row, drafts in work if drafts]
        if single_masks:
            fill.fill_next_token_bitmask_par(self._executor, single_masks, table)
        if draft_masks:
            fill.fill_next_token_bitmask_par_with_draft_tokens(self._executor, draft_masks, table)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _build(self, request: AddRequest) -> GrammarState:
        if not available("llguidance"):
            raise RequestError(
                "structured outputs need llguidance, which the server cannot import; see its log",
                param="structured_outputs",
            )
        from llguidance import LLMatcher

        assert request.grammar is not None
        tokenizer, source = self._tokenizer, request.grammar.source
        matcher = run_on_stack(COMPILE_STACK, lambda: LLMatcher(tokenizer, source))
        if matcher.is_error():
            raise RequestError(f"grammar: {_reason(matcher)}", param="structured_outputs")
        state = GrammarState(matcher, request.grammar.start_after)
        state.consume(request.resume)
        if matcher.is_error():
            raise RequestError(
                f"resume_token_ids do not match the grammar: {_reason(matcher)}",
                param="resume_token_ids",
            )
        self._try_masks(state)
        if matcher.is_error() or state.slow:
            reason = _TOO_SLOW if state.slow else _reason(matcher)
            raise RequestError(f"grammar: {reason}", param="structured_outputs")
        return state

    def _try_masks(self, state: GrammarState) -> None:
        """Compute the next mask, and on a copy those of some tokens after it: the first masks of a
        grammar are the slowest, and some grammars fail at them. Here that delays no step."""
        from llguidance import numpy as fill

        scratch: NDArray[np.int32] = np.zeros((1, -(-self._vocab_size // 32)), dtype=np.int32)
        matcher = state.matcher
        for _ in range(_TRIED_TOKENS):
            if state.slow or matcher.is_stopped() or matcher.is_error():
                return
            with state.timed():
                fill.fill_next_token_bitmask(matcher, scratch)
            words = np.flatnonzero(scratch)
            if not len(words):
                return
            if matcher is state.matcher:
                matcher = matcher.deep_copy()
            last = int(words[-1])
            bits = int(scratch[0, last]) & 0xFFFFFFFF
            with state.timed():
                matcher.consume_token(last * 32 + bits.bit_length() - 1)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if self._path is None or not self._path.exists():
            raise RequestError(
                f"structured outputs need a tokenizer, {self._path or 'which was not loaded'}",
                param="structured_outputs",
            )
        try:
            return LLTokenizer(
                self._path.read_text(), n_vocab=self._vocab_size, eos_token=self._eos_ids
            )
        except BaseException as error:
            if not is_library_failure(error):
                raise
            reason = f"structured outputs do not work with this model's tokenizer: {error}"
            raise RequestError(reason, param="structured_outputs") from None

    @cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor

        return LLExecutor()


def _reason(matcher: LLMatcher) -> str:
    """The first line of a matcher's error; the other lines are its internal state."""
    return matcher.get_error().split("\n", 1)[0]
