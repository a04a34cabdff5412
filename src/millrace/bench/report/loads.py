"""The loads of a report: the runs of each, which of them are valid, medians and ranges.

A run is valid when its figures are those of the server under the load that was asked for. What is
not valid is shown, with the reason, but is no point of a frontier and the best of nothing.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from millrace.bench.report.results import (
    ResultFile,
    grouped,
    interactivity,
    load_label,
    unexpected_hits,
)

MOST_FAILED = 0.05  # share of the requests


class Spread(msgspec.Struct, frozen=True):
    """A figure over repeats: its median and its range; `runs` values."""

    median: float
    low: float
    high: float
    runs: int


class Load(msgspec.Struct, frozen=True):
    """One load of one set of results. name: the set, empty where there is only one; label: the
    load in as few words as tell it from the others."""

    name: str
    label: str
    runs: list[ResultFile]

    @property
    def valid(self) -> list[ResultFile]:
        """The runs that count."""
        return [run for run in self.runs if not problems(run.fields)]

    @property
    def shown(self) -> list[ResultFile]:
        """The runs whose figures are shown: the valid ones, or all where there is none."""
        return self.valid or self.runs

    @property
    def title(self) -> str:
        """The set and the load."""
        return f"{self.name}: {self.label}" if self.name else self.label

    @property
    def middle(self) -> ResultFile:
        """The run with the median throughput."""
        ordered = sorted(self.shown, key=lambda run: float(run.fields["total_token_throughput"]))
        return ordered[len(ordered) // 2]

    def spread(self, figure: str) -> Spread | None:
        """A figure over the shown runs; None where a run lacks it."""
        values = [figure_of(run.fields, figure) for run in self.shown]
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return None
        return Spread(statistics.median(known), min(known), max(known), len(known))


def figure_of(fields: Mapping[str, Any], name: str) -> float | None:
    """A figure of a result file, by its field or one of `interactivity` and `joules_per_token`."""
    if name == "interactivity":
        return interactivity(fields)
    if name == "joules_per_token":
        value = (fields.get("server") or {}).get(name)
    else:
        value = fields.get(name)
    return float(value) if isinstance(value, int | float) else None


def problems(fields: Mapping[str, Any]) -> list[str]:
    """Why a run is not valid; nothing for a valid one."""
    found = []
    ended = (fields.get("completed") or 0) + (fields.get("failed") or 0)
    if fields.get("interrupted"):
        found.append("interrupted")
    if not fields.get("completed"):
        found.append("no request succeeded")
    elif (fields.get("failed") or 0) > MOST_FAILED * ended:
        found.append(f"{fields['failed']} of {ended} requests failed")
    if (fields.get("client") or {}).get("client_bound"):
        found.append("client-bound")
    if unexpected_hits(fields) is not None:
        found.append("its random prompts came from a prefix cache")
    return found


def loads_of(sets: Mapping[str, Sequence[ResultFile]]) -> list[Load]:
    """The loads of every set, the lightest first, equal loads of the sets side by side."""
    every = [run for results in sets.values() for run in results if run.is_run]
    groups = {name: grouped(results, among=every) for name, results in sets.items()}
    words = _labels(grouped(every))
    return [
        Load(name, label, groups[name][key])
        for key, label in words.items()
        for name in sets
        if key in groups[name]
    ]


def _labels(groups: Mapping[tuple[Any, ...], Sequence[ResultFile]]) -> dict[tuple[Any, ...], str]:
    """A short label for each load: its users, or its rate; and lengths where these are not
    enough."""
    whole = {key: load_label(runs[0].fields) for key, runs in groups.items()}
    short = {key: label.rpartition(", ")[0] for key, label in whole.items()}
    count = Counter(short.values())
    return {key: s if s and count[s] == 1 else whole[key] for key, s in short.items()}


def drawn(loads: Sequence[Load], most: int) -> list[Load]:
    """At most so many loads for one chart: evenly spread, the lightest and the highest of each set
    among them."""
    names = list(dict.fromkeys(load.name for load in loads))
    sets = [[load for load in loads if load.name == name] for name in names]
    kept = [load for own in sets for load in _spread_evenly(own, most // len(sets))]
    return [load for load in loads if load in kept]


def _spread_evenly(loads: Sequence[Load], most: int) -> list[Load]:
    if len(loads) <= most:
        return list(loads)
    last = len(loads) - 1
    return [loads[round(n * last / (most - 1))] for n in range(most)]
