"""What each replica showed in a phase, so that one which differs from the others is seen.

A replica is an engine that was sampled itself, or one that a gateway's page names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from millrace.observe.report.phases import RUNNING
from millrace.observe.report.series import Samples, Series
from millrace.observe.samples.sample import Array

WAITING = ("millrace:num_requests_waiting", "vllm:num_requests_waiting")
KV_USAGE = ("millrace:kv_cache_usage_perc", "vllm:kv_cache_usage_perc")
OUTPUT = ("millrace:generation_tokens_total", "vllm:generation_tokens_total")
STEP_SECONDS = "millrace:step_seconds_total"
COMPUTE_SECONDS = "millrace:estimated_peak_compute_seconds_total"
MEMORY_SECONDS = "millrace:estimated_peak_memory_seconds_total"
UP = ("millrace:engine_up", "up")


@dataclass(frozen=True)
class Replica:
    """Medians of gauges, rates of counters; None where nothing said it. up: the share of seconds in
    which its engine ran. name: its address, or the gateway's and its own name there."""

    name: str
    up: float | None
    running: float | None
    waiting: float | None
    kv_usage: float | None
    output_rate: float | None
    busy: float | None
    mfu: float | None
    mbu: float | None


def replicas(samples: Samples, start: float, end: float) -> list[Replica]:
    """All that have said how many requests run, by name."""
    names = sorted({one.engine for one in samples.series(*RUNNING)})
    return [_replica(samples, name, start, end) for name in names]


def _replica(samples: Samples, name: str, start: float, end: float) -> Replica:
    def own(names: tuple[str, ...]) -> list[Series]:
        return [one for one in samples.series(*names) if one.engine == name]

    def gauge(names: tuple[str, ...], combine: Callable[[Array], float]) -> float | None:
        values = [one.between(start, end) for one in own(names)]
        known = [one for one in values if len(one)]
        return sum(combine(one) for one in known) if known else None

    def rate(*names: str) -> float | None:
        found = [one for one in own(names) if one.span(start, end)]
        gained = (one.increase(start, end) / one.span(start, end) for one in found)
        return sum(gained) if found else None

    ups = [one.between(start, end) for one in own(UP)]
    return Replica(
        name=name,
        up=min((float(np.mean(one)) for one in ups if len(one)), default=None),
        running=gauge(RUNNING, _median),
        waiting=gauge(WAITING, _median),
        kv_usage=gauge(KV_USAGE, _median),
        output_rate=rate(*OUTPUT),
        busy=rate(STEP_SECONDS),
        mfu=rate(COMPUTE_SECONDS),
        mbu=rate(MEMORY_SECONDS),
    )


def _median(values: Array) -> float:
    return float(np.median(values))
