"""Requests in flight as columns, one row each, and the records of those that have ended.

A row is used again once its request has ended. This module knows no replica's state and no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from millrace.bench.workload.prompts import (
    FileSpec,
    RandomSpec,
    TraceSpec,
    Workload,
    length_range,
)
from millrace.errors import UserError

_FLOATS = ("due", "sent", "first", "arrives")
_COUNTS = (
    *("prompt", "output"),  # tokens, as the client asked
    *("known", "made"),  # tokens that an engine gets as a prompt; of these, output
    *("left", "stop"),  # prompt tokens to compute; of these, those before a snapshot, 0: none
    *("replica", "size", "steps", "entered", "pages", "next", "planned", "number"),
)
_FLAGS = ("used", "split", "admitted", "decoding", "ending", "failed")


class RequestTable:
    """The columns. Times are seconds, -1 for never; next: the row behind it in a list, -1: none.

    arrives: at its engine. size: the load that the gateway counts. steps: decode steps that it
    needs; entered: the number of the step before the first of them. planned: the turn in which
    some of its prompt was last computed. number: in the order in which they are sent.
    """

    due: np.ndarray
    sent: np.ndarray
    first: np.ndarray
    arrives: np.ndarray
    prompt: np.ndarray
    output: np.ndarray
    known: np.ndarray
    made: np.ndarray
    left: np.ndarray
    stop: np.ndarray
    replica: np.ndarray
    size: np.ndarray
    steps: np.ndarray
    entered: np.ndarray
    pages: np.ndarray
    next: np.ndarray
    planned: np.ndarray
    number: np.ndarray
    used: np.ndarray
    split: np.ndarray
    admitted: np.ndarray
    decoding: np.ndarray
    ending: np.ndarray
    failed: np.ndarray

    def __init__(self, capacity: int = 1024) -> None:
        for names, kind in ((_FLOATS, np.float64), (_COUNTS, np.int64), (_FLAGS, np.bool_)):
            for name in names:
                setattr(self, name, np.zeros(capacity, dtype=kind))
        self._free = list(range(capacity - 1, -1, -1))

    def take(self) -> int:
        """A free row."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self.used[row] = True
        return row

    def free(self, row: int) -> None:
        """The request of this row has ended."""
        self.used[row] = False
        self._free.append(row)

    def _grow(self) -> None:
        old = len(self.used)
        for name in (*_FLOATS, *_COUNTS, *_FLAGS):
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        self._free = list(range(2 * old - 1, old - 1, -1))


class EndedRequests:
    """The columns of requests that have ended, in the order in which they did."""

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = {}
        self.count = 0

    def add(self, **columns: np.ndarray) -> None:
        """Some requests; every call has the same columns."""
        for name, values in columns.items():
            self._parts.setdefault(name, []).append(values)
        self.count += len(next(iter(columns.values())))

    def column(self, name: str, kind: Any) -> np.ndarray:
        """All values of one column."""
        parts = self._parts.get(name)
        return np.concatenate(parts).astype(kind) if parts else np.zeros(0, dtype=kind)


# --- lengths ------------------------------------------------------------------------------------

_BLOCK = 8192
_FEW = 64  # tokens whose steps are drawn one by one


def lengths_of(spec: Workload) -> Iterator[tuple[int, int]]:
    """(prompt, output) tokens of each request, without texts.

    Raises UserError for workloads whose prompts have something in common.
    """
    if isinstance(spec, RandomSpec) and spec.turns == 1 and not spec.prefix_len:
        return _counted(spec.count, _random_lengths(spec))
    if isinstance(spec, TraceSpec) and not any(row.blocks for row in spec.rows):
        return _counted(
            spec.count, _repeated([(r.input_tokens, r.output_tokens) for r in spec.rows])
        )
    if isinstance(spec, FileSpec) and not any(one.later_turns for one in spec.prompts):
        pairs = [(one.input_tokens, one.output_tokens) for one in spec.prompts]
        return _counted(spec.count, _repeated(pairs))
    raise UserError(
        "--mode aggregated knows no shared prefixes and no conversations: use --mode event, or "
        "--dataset-name random, or a trace without hash_ids"
    )


def _counted(count: int | None, pairs: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    return pairs if count is None else islice(pairs, count)


def _repeated(pairs: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    while True:
        yield from pairs


def _random_lengths(spec: RandomSpec) -> Iterator[tuple[int, int]]:
    """Lengths as the workload draws them, though not the same ones for each number."""
    inputs = length_range(spec.input_len, spec.range_ratio, spec.convention)
    outputs = length_range(spec.output_len, spec.range_ratio, spec.convention)
    rng = np.random.default_rng((spec.seed, 7))
    while True:
        drawn = rng.integers(inputs[0], inputs[1] + 1, _BLOCK) + spec.context_len
        made = rng.integers(outputs[0], outputs[1] + 1, _BLOCK)
        yield from zip(drawn.tolist(), made.tolist(), strict=True)


def steps_drawer(
    acceptance: tuple[float, ...], rng: np.random.Generator
) -> Callable[[np.ndarray], np.ndarray]:
    """The function from numbers of tokens to numbers of decode steps that bring them.

    Few tokens are drawn step by step. Of many, the number of steps has Wald's mean, with the mean
    overshoot of a renewal process, and the spread of its central limit. Without drafts a step
    brings one token.
    """
    if not any(acceptance):
        return lambda tokens: tokens
    mean, variance = step_tokens_moments(acceptance)
    overshoot = (variance + mean * mean - mean) / (2 * mean)
    shares = np.cumsum(_step_tokens(acceptance))[:-1]

    def draw_few(tokens: np.ndarray) -> np.ndarray:
        drawn = np.searchsorted(shares, rng.random((len(tokens), _FEW))) + 1
        reached = np.cumsum(drawn, axis=1) >= tokens[:, None]
        steps: np.ndarray = np.argmax(reached, axis=1) + 1
        return steps

    def draw(tokens: np.ndarray) -> np.ndarray:
        centre = (tokens + overshoot) / mean
        spread = np.sqrt(tokens * variance / mean**3)
        drawn = centre + spread * rng.standard_normal(len(tokens)) + rng.random(len(tokens))
        steps: np.ndarray = np.floor(drawn).astype(np.int64)
        few = tokens <= _FEW
        if few.any():
            steps[few] = draw_few(tokens[few])
        return np.clip(steps, -(-tokens // (len(acceptance) + 1)), tokens)

    return draw


def _step_tokens(acceptance: tuple[float, ...]) -> list[float]:
    """How likely a decode row is to bring 1, 2, ... tokens in a step."""
    chances, so_far = [], 1.0
    for chance in acceptance:
        chances.append(so_far * (1 - chance))
        so_far *= chance
    return [*chances, so_far]


def step_tokens_moments(acceptance: tuple[float, ...]) -> tuple[float, float]:
    """(mean, variance) of the tokens that a decode row brings in a step."""
    chances = _step_tokens(acceptance)
    mean = sum((n + 1) * p for n, p in enumerate(chances))
    return mean, sum((n + 1 - mean) ** 2 * p for n, p in enumerate(chances))
