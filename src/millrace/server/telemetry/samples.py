"""One sample a second for the live page, from what the server knows already.

The engine is not asked: its figures came with its last message, latencies are counted here, and a
thread reads the GPUs. Who keeps the samples is not known here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from millrace.dashboard.sample import BOUNDS, Buckets, Sample
from millrace.protocol import EngineStats
from millrace.server.telemetry.metrics import Histogram, RequestMetrics

DeviceFigures = Mapping[tuple[str, str], Mapping[str, float]]


class Sampler:
    """Makes samples of what happened since the last one.

    stats: gives the engine's latest figures. devices: those of its GPUs, as `DeviceSampler` has
    them.
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        requests: RequestMetrics,
        devices: Callable[[], DeviceFigures] = dict,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._stats, self._requests, self._devices, self._now = stats, requests, devices, now
        self._last = stats()
        self._latencies = {
            "ttft": _Latency("ttft", requests.time_to_first_token),
            "itl": _Latency("itl", requests.inter_token_latency),
            "tpot": _Latency("tpot", requests.time_per_output_token),
        }
        self._ended = self._failed = 0
        self._count_ends()

    def take(self) -> Sample:
        """The sample of the time since the last call."""
        before, stats = self._last, self._stats()
        self._last = stats
        if stats.steps < before.steps:  # another engine: its totals begin at 0
            before = EngineStats()
        ended, failed = self._count_ends()
        devices = list(self._devices().values())
        clocks = [one["sm_clock_mhz"] for one in devices if "sm_clock_mhz" in one]
        return Sample(
            at=round(self._now()),
            tokens_in=stats.prefilled_tokens - before.prefilled_tokens,
            tokens_out=stats.generated_tokens - before.generated_tokens,
            running=stats.running,
            waiting=stats.waiting,
            pages=(stats.total_pages - stats.free_pages - stats.evictable_pages, stats.total_pages),
            states=(stats.snapshots_used, stats.snapshots_total),
            queries=stats.prefix_queries - before.prefix_queries,
            hits=stats.prefix_hits - before.prefix_hits,
            drafts=stats.drafts - before.drafts,
            draft_tokens=stats.draft_tokens - before.draft_tokens,
            accepted=_since(before.accepted_per_position, stats.accepted_per_position),
            steps=_seconds_since(before.step_times, stats.step_times),
            power=round(sum(one.get("power_watts", 0.0) for one in devices), 1),
            clock=round(sum(clocks) / len(clocks)) if clocks else 0.0,
            ended=ended,
            failed=failed,
            **{name: latency.take() for name, latency in self._latencies.items()},
        )

    def _count_ends(self) -> tuple[int, int]:
        """Requests that ended since the last call, and how many of them failed."""
        finished = self._requests.finished
        total, failed = sum(finished.values()), finished["error"]
        new = total - self._ended, failed - self._failed
        self._ended, self._failed = total, failed
        return new


class _Latency:
    """What came to a histogram since the last look. Its bounds are among BOUNDS[name]."""

    def __init__(self, name: str, histogram: Histogram) -> None:
        self._histogram = histogram
        bounds = BOUNDS[name]
        rows = histogram.buckets(vllm=False)
        self._at = [*(bounds.index(float(bound)) for bound, _ in rows[:-1]), len(bounds)]
        self._seen = [0.0] * len(rows)
        self.take()

    def take(self) -> Buckets:
        counts = [count for _, count in self._histogram.buckets(vllm=False)]
        new, below = [], 0.0
        for at, count, seen in zip(self._at, counts, self._seen, strict=True):
            fresh = count - seen  # of this bucket and all below
            if fresh > below:
                new.append((at, int(fresh - below)))
            below = fresh
        self._seen = counts
        return new


def _since(before: list[int], after: list[int]) -> list[int]:
    earlier = [*before, *[0] * (len(after) - len(before))]
    return [b - a for a, b in zip(earlier, after, strict=False)]


def _seconds_since(before: list[float], after: list[float]) -> list[float]:
    earlier = before or [0.0] * len(after)
    new = [round(b - a, 6) for a, b in zip(earlier, after, strict=True)]
    return new if any(new) else []
