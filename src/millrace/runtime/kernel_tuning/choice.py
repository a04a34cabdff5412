"""Chooses ways by measured costs. Knows no kernel and no device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from millrace.errors import ConfigError
from millrace.kernels.gpu.tables import ANY_SIZE, Line, Shape, Way

logger = logging.getLogger("millrace.kernels")

GAIN = 0.98  # of the rule's cost, to be taken instead of it
Run = Callable[[], Tensor]
Costs = dict[Way, float]  # of a call, in seconds or joules
Meter = Callable[[Mapping[Way, Sequence[Run]]], Costs]


@dataclass(frozen=True)
class Problem:
    """An op at one shape and size.

    runs: the calls of a way, one for each copy of the weights, so that a way that is called round
    them finds none in the cache. reference: what the first of them should bring, or its first rows.
    tolerance: of the relative error.
    """

    runs: Callable[[Way], list[Run]]
    reference: Tensor
    tolerance: float


class Section(Protocol):
    """An op whose ways are measured. name: of its section in the tables."""

    name: str

    def shapes(self) -> Sequence[Shape]:
        """That the model has."""

    def sizes(self, shape: Shape) -> Sequence[int]:
        """Ascending; each stands for those between it and the one before."""

    def ways(self, shape: Shape, size: int) -> list[Way]:
        """What can be taken. The first is what the rule says."""

    def prepare(self, shape: Shape) -> Callable[[int], Problem]:
        """Make the weights. Returns what makes the problem of a size."""


def lines_of(section: Section, shape: Shape, meter: Meter) -> tuple[Line, ...]:
    """The fastest ways of a shape, size by size. Raises ConfigError if the rule's own way fails."""
    problem_of = section.prepare(shape)
    found: list[Line] = []
    for size in section.sizes(shape):
        ways = section.ways(shape, size)
        costs = meter(dict(_right(section, shape, size, ways, problem_of(size))))
        way = cheapest(costs, ways[0])
        found.append((size, way))
        _log(section.name, shape, size, way, costs, ways[0])
    return merged(found)


def _right(
    section: Section, shape: Shape, size: int, ways: list[Way], problem: Problem
) -> Iterator[tuple[Way, list[Run]]]:
    """The ways that run here and bring the right numbers, and their calls."""
    for way in ways:
        try:
            runs = problem.runs(way)
            error = relative(runs[0](), problem.reference)
            why = "" if error <= problem.tolerance else f"its error is {error:.2g}"
        except Exception as failure:  # a compiler's, a driver's: whatever a way may raise
            why = f"{type(failure).__name__}: {failure}".splitlines()[0]
        if not why:
            yield way, runs
            continue
        where = f"{section.name} {_text(shape)}, {size}: {way}"
        if way == ways[0]:
            raise ConfigError(f"{where} is what is taken by default, and fails: {why}")
        logger.warning("%s is left out: %s", where, why)


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, of as many rows as `want` has."""
    want = want.float()
    return float((got[: len(want)].float() - want).norm() / want.norm())


def cheapest(costs: Costs, default: Way) -> Way:
    """The cheapest way; the default one if it costs hardly more."""
    best = min(costs, key=lambda way: costs[way])
    return best if costs[best] < GAIN * costs[default] else default


def merged(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Without the lines that the next one makes needless: it has the same way. A single size stands
    for all."""
    if len(lines) == 1:
        return ((ANY_SIZE, lines[0][1]),)
    pairs = zip(lines, [*lines[1:], None], strict=True)
    return tuple(line for line, above in pairs if above is None or line[1] != above[1])


def _log(name: str, shape: Shape, size: int, way: Way, costs: Costs, default: Way) -> None:
    ranked = sorted(costs, key=lambda one: costs[one])
    shown = ", ".join(f"{_text(one)} {costs[one] * 1e6:.1f}" for one in ranked)
    gain = costs[default] / costs[way]
    logger.info(
        "%s %s, %d: %s, %.2f times the default (in millionths: %s)",
        name, _text(shape), size, _text(way), gain, shown,
    )  # fmt: skip


def _text(way: Way) -> str:
    return way if isinstance(way, str) else "x".join(map(str, way))
