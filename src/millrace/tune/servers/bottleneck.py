"""What limits a server, read from its own metrics during a load, in words.

The words say what was seen; which knob follows from it stands in the search space.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from millrace.bench.measure.telemetry import Sample
from millrace.tune.space.knobs import Bottleneck

_FULL = 0.9  # of the KV pages
_BUSY_GPU = 0.8  # share of the time
_REJECTED = 0.4  # share of drafts that are accepted
_UNEVEN = 1.5  # the busiest replica over the mean
_PREFILL = 0.5  # TTFT as a share of a request's time
_MANY = 0.05  # of the running requests: so many that wait are a queue


class Reading(msgspec.Struct, frozen=True):
    """One finding: what limits, and by which figures."""

    bottleneck: Bottleneck
    why: str


def read_bottleneck(
    samples: Sequence[Sample], fields: Mapping[str, Any], client_bound: str
) -> Reading | None:
    """What limited a run; None where its server has no metrics. fields: of its result file."""
    if client_bound:
        return Reading("client_bound", f"the load generator limits: {client_bound}")
    middle = list(samples[len(samples) // 4 : len(samples) - len(samples) // 4])
    running = _median(middle, "num_requests_running")
    waiting = _median(middle, "num_requests_waiting")
    if running is None or waiting is None:
        return None
    found = (
        _queue(middle, fields, running, waiting)
        or _uneven(middle)
        or _rejected(fields)
        or _host(middle, running)
    )
    return found or _compute(fields, running)


def _queue(
    middle: Sequence[Sample], fields: Mapping[str, Any], running: float, waiting: float
) -> Reading | None:
    """Requests wait: for KV pages or for slots. Preempted ones want pages too."""
    used = _median(middle, "kv_cache_usage_perc") or 0.0
    counters = (fields.get("server") or {}).get("counters") or {}
    preempted = float(counters.get("num_preemptions", 0.0))
    queue = waiting >= max(1.0, _MANY * running)
    if preempted > 0 or (queue and used >= _FULL):
        return Reading(
            "kv_full",
            f"{waiting:.0f} requests wait while {used:.0%} of the KV cache is in use"
            + (f"; {preempted:.0f} preemptions" if preempted else ""),
        )
    if queue:
        return Reading(
            "slots_full",
            f"{waiting:.0f} requests wait behind {running:.0f} that run, while {used:.0%} of the "
            "KV cache is in use: slots are full",
        )
    return None


def _uneven(middle: Sequence[Sample]) -> Reading | None:
    """One replica has far more requests than the others."""
    shares = [max(s.running) / statistics.fmean(s.running) for s in middle if any(s.running)]
    several = any(len(sample.running) > 1 for sample in middle)
    if several and shares and statistics.median(shares) > _UNEVEN:
        ratio = statistics.median(shares)
        return Reading("imbalance", f"the busiest replica has {ratio:.1f} times the mean load")
    return None


def _rejected(fields: Mapping[str, Any]) -> Reading | None:
    """Drafts are computed and thrown away."""
    spec = (fields.get("server") or {}).get("speculation") or {}
    rates = [float(rate) for rate in spec.get("acceptance_by_position") or ()]
    if rates and rates[-1] < _REJECTED:
        return Reading(
            "drafts_rejected", f"the last of {len(rates)} drafts is accepted at {rates[-1]:.0%}"
        )
    return None


def _host(middle: Sequence[Sample], running: float) -> Reading | None:
    """Requests run, and the GPU waits."""
    busy = [s.gpu["utilization"] for s in middle if "utilization" in s.gpu]
    if running >= 1 and busy and statistics.median(busy) < _BUSY_GPU:
        share = statistics.median(busy)
        return Reading(
            "host_bound", f"the GPU is busy {share:.0%} of the time with {running:.0f} requests"
        )
    return None


def _compute(fields: Mapping[str, Any], running: float) -> Reading:
    """Nothing waits: prompts or decode steps take the time."""
    ttft, whole = float(fields["mean_ttft_ms"]), float(fields["mean_e2el_ms"])
    share = ttft / whole if whole else 0.0
    if share > _PREFILL:
        why = f"{share:.0%} of a request's time is before its first token"
        return Reading("prefill_compute", why)
    limit = fields.get("max_concurrency")
    if limit and running < 0.7 * float(limit):
        return Reading(
            "host_bound", f"{running:.0f} of {limit} requests are in the engine at a time"
        )
    return Reading(
        "decode_bandwidth",
        f"nothing waits and {1 - share:.0%} of a request's time is decoding {running:.0f} at once",
    )


def _median(middle: Sequence[Sample], name: str) -> float | None:
    known = [sample.server[name] for sample in middle if name in sample.server]
    return statistics.median(known) if known else None
