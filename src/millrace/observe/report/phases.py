"""The phases of a run: those that somebody marked, else found from the requests that run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from millrace.observe.report.series import Samples

STEADY = 0.8  # of the most requests that ran at once
SHORTEST = 2.0  # seconds
RUNNING = ("millrace:num_requests_running", "vllm:num_requests_running")


@dataclass(frozen=True)
class Phase:
    """[start, end), seconds since 1970."""

    name: str
    start: float
    end: float


def phases(samples: Samples, events: Sequence[tuple[float, str]]) -> list[Phase]:
    """All phases in order. events: (when, phase that begins then); what is before the first is
    `before`."""
    if not events:
        return found_phases(samples)
    begins = [(samples.start, "before"), *events, (samples.end, "")]
    return [
        Phase(name, start, end)
        for (start, name), (end, _) in pairwise(begins)
        if end - start >= 1.0
    ]


def found_phases(samples: Samples) -> list[Phase]:
    """idle, ramp, steady, drain, idle: steady between the first and the last time at which most
    requests ran."""
    t, running = samples.over_time(samples.start, samples.end, *RUNNING)
    peak = float(np.max(running, initial=0.0))
    if not peak:
        return [Phase("idle", samples.start, samples.end)]
    busy, full = np.flatnonzero(running > 0), np.flatnonzero(running >= STEADY * peak)
    inner = [t[busy[0]], t[full[0]], t[full[-1]] + 1, t[busy[-1]] + 1]
    edges = [samples.start, *map(float, inner), samples.end]
    names = ("idle", "ramp", "steady", "drain", "idle")
    return [
        Phase(name, start, end)
        for name, (start, end) in zip(names, pairwise(edges), strict=True)
        if end - start >= (1.0 if name == "steady" else SHORTEST)
    ]
