"""Stored samples as series over time: rates that survive restarts, sums over sources, quantiles.

Times are seconds since 1970 on the observer's clock.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from millrace.observe.samples.sample import Array, Points


class Series:
    """One figure of one source: t, values; labels as a dict."""

    def __init__(self, source: str, labels: str, t: Array, values: Array) -> None:
        self.source = source
        self.labels: Mapping[str, str] = json.loads(labels) if labels else {}
        order = np.argsort(t, kind="stable")
        self.t, self.values = t[order], values[order]

    @property
    def engine(self) -> str:
        """The engine whose figure it is: a source, or a replica of a gateway."""
        replica = self.labels.get("replica", "")
        return f"{self.source} {replica}" if replica else self.source

    def increase(self, start: float, end: float) -> float:
        """What a counter gained between two times. One that fell was started again, from 0."""
        inside = (self.t >= start) & (self.t <= end)
        steps = np.diff(self.values[inside])
        return float(np.where(steps < 0, self.values[inside][1:], steps).sum())

    def rate(self, grid: Array) -> Array:
        """A counter's increase in each second of a grid of seconds."""
        steps = np.diff(self.values, prepend=self.values[:1])
        gained = np.cumsum(np.where(steps < 0, self.values, steps))
        ends = np.append(grid, grid[-1:] + 1.0)
        return np.asarray(np.diff(np.interp(ends, self.t, gained)))

    def between(self, start: float, end: float) -> Array:
        """The values between two times."""
        return self.values[(self.t >= start) & (self.t <= end)]

    def span(self, start: float, end: float) -> float:
        """Seconds between the first and the last sample between two times."""
        inside = self.t[(self.t >= start) & (self.t <= end)]
        return float(inside[-1] - inside[0]) if len(inside) > 1 else 0.0


class Samples:
    """All series of a run, by name. whole_gpus: figures of which each GPU counts once, however many
    engines or instances of it say them."""

    def __init__(self, points: Points, whole_gpus: Iterable[str] = ()) -> None:
        self._by_name: dict[str, list[Series]] = defaultdict(list)
        for (name, source, labels), (t, values) in points.items():
            self._by_name[name].append(Series(source, labels, t, values))
        self.engines: dict[str, set[str]] = {
            name: {one.engine for one in found} for name, found in self._by_name.items()
        }  # that have each figure
        for name in whole_gpus:
            self._by_name[name] = _once(self._by_name.get(name, []))
        times = [series.t for found in self._by_name.values() for series in found]
        self.start = min((float(t[0]) for t in times), default=0.0)
        self.end = max((float(t[-1]) for t in times), default=0.0)

    def series(self, *names: str) -> list[Series]:
        """All series of these names: of a source only one of them is kept."""
        return [one for name in names for one in self._by_name.get(name, ())]

    def increase(self, start: float, end: float, *names: str) -> float:
        """Summed over all series of a counter."""
        return sum(one.increase(start, end) for one in self.series(*names))

    def rate(self, start: float, end: float, *names: str) -> float | None:
        """A counter's increase each second, summed over all series; None without samples."""
        found = self.series(*names)
        span = max((one.span(start, end) for one in found), default=0.0)
        return self.increase(start, end, *names) / span if span else None

    def rate_by(self, label: str, start: float, end: float, name: str) -> dict[str, float]:
        """The same by the values of a label, without those that do not move."""
        sums: dict[str, float] = defaultdict(float)
        for one in self.series(name):
            if span := one.span(start, end):
                sums[one.labels.get(label, "")] += one.increase(start, end) / span
        return {value: rate for value, rate in sums.items() if rate}

    def over_time(
        self, start: float, end: float, *names: str, combine: Callable[[Array], Array] | None = None
    ) -> tuple[Array, Array]:
        """A gauge on a grid of seconds, combined over all series (a sum, if not said otherwise);
        seconds in which a series has no sample have its last one, and 0 once it is silent."""
        grid: Array = np.arange(start, end, 1.0, dtype=np.float64)
        found = self.series(*names)
        if not found or not len(grid):
            return grid[:0], grid[:0]
        table = np.stack([_on_grid(one, grid) for one in found])
        return grid, combine(table) if combine else table.sum(axis=0)

    def quantile(self, q: float, start: float, end: float, *names: str) -> float | None:
        """Of a histogram (names of its buckets), over all series; None without a value."""
        return quantile_of(q, self.cumulative(start, end, *names))

    def cumulative(self, start: float, end: float, *names: str) -> list[tuple[float, float]]:
        """(bound, values up to it) of a histogram, over all series. Names may have buckets of their
        own; between two of its bounds the values of one are spread evenly."""
        tables = []
        for name in names:
            counts: dict[float, float] = defaultdict(float)
            for one in self.series(name):
                counts[float(one.labels["le"])] += one.increase(start, end)
            if counts:
                tables.append(sorted(counts.items()))
        bounds = sorted({bound for table in tables for bound, _ in table})
        return [(bound, sum(_up_to(bound, table) for table in tables)) for bound in bounds]


def _once(found: Sequence[Series]) -> list[Series]:
    """Of series of the same GPU the longest."""
    by_gpu: dict[Any, Series] = {}
    for number, one in enumerate(found):
        uuid = one.labels.get("uuid") or one.labels.get("UUID") or number
        if uuid not in by_gpu or len(by_gpu[uuid].t) < len(one.t):
            by_gpu[uuid] = one
    return list(by_gpu.values())


def quantile_of(q: float, cumulative: Sequence[tuple[float, float]]) -> float | None:
    """As Prometheus computes it: linear within a bucket."""
    if not cumulative or not cumulative[-1][1]:
        return None
    rank, low, seen = q * cumulative[-1][1], 0.0, 0.0
    for bound, count in cumulative:
        if count >= rank:
            if bound == float("inf"):
                return low
            within = count - seen
            return low + (bound - low) * ((rank - seen) / within if within else 1.0)
        low, seen = bound, count
    return low


def _up_to(bound: float, cumulative: Sequence[tuple[float, float]]) -> float:
    low, seen = 0.0, 0.0
    for high, count in cumulative:
        if bound == high:
            return count
        if bound < high:
            whole = high == float("inf")  # all that is known of it is that it is above
            return seen if whole else seen + (count - seen) * (bound - low) / (high - low)
        low, seen = high, count
    return seen


def _on_grid(one: Series, grid: Array) -> Array:
    at = np.searchsorted(one.t, grid + 1.0, side="left") - 1
    known = one.values[np.clip(at, 0, None)]
    fresh = (at >= 0) & (grid - one.t[np.clip(at, 0, None)] < 5.0)
    return np.where(fresh, known, 0.0)
