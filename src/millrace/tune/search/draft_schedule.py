"""How many drafts are best at which batch size, measured with the best settings of a study.

After the finals every number of drafts that works is started by turns, a round after the other,
and loaded with few and with many requests in flight. Drafts pay while a step waits for memory, and
cost once it computes, so the best number falls as the batch grows. How an engine reads the schedule
is not known here, but what holds in every engine: its ranges begin at 1, leave no gap and have no
end.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import msgspec

from millrace.tune.search.comparison import verdict
from millrace.tune.space.knobs import COPIES, Knob, Settings, Space, Value
from millrace.tune.trials.history import History, penalised
from millrace.tune.trials.outcome import Outcome, Visit

_APART = 4  # a batch size over the one before
_ROWS = 1 << 16  # more than an engine has in a step: the end of the last range
_MOST_DEPTHS = 3  # numbers of drafts in one schedule: engines capture graphs for each
_WORTH = 0.01  # by which more drafts must be better than fewer


class DraftRow(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured at one batch size. speeds: tok/s by the number of drafts; best: of those
    in the schedule the one to use."""

    batch: int
    speeds: dict[int, float]
    best: int


class DraftSchedule(msgspec.Struct, frozen=True, kw_only=True):
    """ranges: (least rows, most rows, drafts), from 1 on, without gaps. rows: the figures that they
    follow from. settings: the study's best, with the most drafts of the schedule."""

    ranges: tuple[tuple[int, int, int], ...]
    rows: tuple[DraftRow, ...]
    settings: Settings

    @property
    def most(self) -> int:
        return max(drafts for _, _, drafts in self.ranges)


def drafts_knob(space: Space) -> Knob | None:
    """The knob whose values an engine takes by batch size."""
    return next((knob for knob in space.knobs if knob.by_batch), None)


def batch_sizes(streams: int) -> tuple[int, ...]:
    """The numbers of requests in flight that are measured, up to `streams`."""
    sizes = [1]
    while sizes[-1] * _APART * 2 <= streams:
        sizes.append(sizes[-1] * _APART)
    return (*sizes, streams) if streams > sizes[-1] else tuple(sizes)


def to_measure(history: History, fixed: Mapping[str, Value]) -> list[Settings]:
    """The best settings on one engine, with every number of drafts that has not failed; empty
    where there is nothing to choose."""
    knob, found = drafts_knob(history.space), verdict(history)
    if knob is None or knob.name in fixed or found is None:
        return []
    settings = [
        one
        for one in _with_drafts(history.space, knob, history.trials[found.best].settings)
        if not history.space.problem(one) and history.no_go.blocks(one) is None
    ]
    return settings if len(settings) > 1 else []


def _with_drafts(space: Space, knob: Knob, best: Settings) -> Iterator[Settings]:
    alone = dict.fromkeys(COPIES, 1)  # a schedule is of one engine
    for value in knob.values:
        yield space.normal({**best, **alone, knob.name: value})


def draft_schedule(history: History) -> DraftSchedule | None:
    """The schedule by the visits so far; None where no two numbers of drafts were compared, or
    none is better than no drafts."""
    knob, found = drafts_knob(history.space), verdict(history)
    logs = _shares(history.draft_visits, knob)
    if knob is None or found is None or len(logs) < 2:
        return None
    penalty = history.goal.spread_penalty
    scores = {
        depth: {batch: penalised([math.exp(v) for v in at[batch]], penalty) for batch in at}
        for depth, at in logs.items()
    }
    batches = sorted(next(iter(scores.values())))
    kept = _few(scores, batches)
    chosen = [_best(scores, kept, batch) for batch in batches]
    if not any(chosen):
        return None
    speeds = _speeds(history.draft_visits, knob)
    rows = tuple(
        DraftRow(batch=batch, speeds={d: speeds[d][batch] for d in sorted(scores)}, best=best)
        for batch, best in zip(batches, chosen, strict=True)
    )
    best = history.trials[found.best].settings
    settings = history.space.normal({**best, knob.name: max(chosen)})
    return DraftSchedule(ranges=_ranges(batches, chosen), rows=rows, settings=settings)


def _shares(
    visits: Sequence[tuple[Visit, Outcome]], knob: Knob | None
) -> dict[int, dict[int, list[float]]]:
    """By drafts and batch size: the logarithm of the speed in each round, relative to the mean of
    all drafts in that round. Drafts that failed are left out, and rounds that one of the others
    lacks."""
    if knob is None:
        return {}
    failed = {_depth(visit, knob) for visit, outcome in visits if outcome.failure is not None}
    logs: dict[int, dict[int, dict[int, float]]] = {}  # by drafts, round and batch size
    for visit, outcome in visits:
        if (depth := _depth(visit, knob)) not in failed:
            pairs = zip(visit.streams, outcome.runs, strict=True)
            found = {batch: math.log(max(run.total, 1e-12)) for batch, run in pairs}
            logs.setdefault(depth, {})[visit.round] = found
    rounds = sorted(set.intersection(*(set(at) for at in logs.values()))) if logs else []
    batches = {batch for at in logs.values() for number in rounds for batch in at[number]}

    def share(depth: int, number: int, batch: int) -> float:
        return logs[depth][number][batch] - statistics.fmean(
            at[number][batch] for at in logs.values()
        )

    return {
        depth: {batch: [share(depth, number, batch) for number in rounds] for batch in batches}
        for depth in logs
        if rounds
    }


def _depth(visit: Visit, knob: Knob) -> int:
    value = visit.settings[knob.name]
    return int(value) if isinstance(value, int) else 0


def _speeds(visits: Sequence[tuple[Visit, Outcome]], knob: Knob) -> dict[int, dict[int, float]]:
    """By drafts and batch size: the median of tok/s."""
    found: dict[int, dict[int, list[float]]] = {}
    for visit, outcome in visits:
        for batch, run in zip(visit.streams, outcome.runs, strict=False):
            found.setdefault(_depth(visit, knob), {}).setdefault(batch, []).append(run.total)
    return {
        depth: {batch: statistics.median(values) for batch, values in at.items()}
        for depth, at in found.items()
    }


def _best(scores: Mapping[int, Mapping[int, float]], kept: Sequence[int], batch: int) -> int:
    """The number of drafts for a batch size: the fewest of those that are as good as the best."""
    enough = max(scores[depth][batch] for depth in kept) * (1.0 - _WORTH)
    return min(depth for depth in kept if scores[depth][batch] >= enough)


def _few(scores: Mapping[int, Mapping[int, float]], batches: Sequence[int]) -> tuple[int, ...]:
    """The numbers of drafts that a schedule uses: those that lose least where they are too many."""

    def lost(kept: Sequence[int]) -> float:
        return -sum(math.log(scores[_best(scores, kept, batch)][batch]) for batch in batches)

    return min(combinations(sorted(scores), min(_MOST_DEPTHS, len(scores))), key=lost)


def _ranges(batches: Sequence[int], chosen: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Ranges of rows; a border lies at the geometric mean of the batch sizes beside it."""
    found: list[tuple[int, int, int]] = []
    least = 1
    for at, drafts in enumerate(chosen):
        last = at + 1 == len(chosen)
        most = _ROWS if last else max(least, math.isqrt(batches[at] * batches[at + 1]))
        if found and found[-1][2] == drafts:
            least = found.pop()[0]
        found.append((least, most, drafts))
        least = most + 1
    return tuple(found)
