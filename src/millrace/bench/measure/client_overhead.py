"""What the load generator cost, how late it read its clock, and the error of the figures from that.

Beacons are times that are written to each load process while it sends. The delay with which a
beacon is read is the delay with which a chunk that arrived at that moment was stamped. The error of
TTFT is the difference between its percentiles and those of the times corrected by that delay. The
error of ITL is the difference between its percentiles and those of the gaps whose two ends were
read on time. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from millrace.bench.load.process_pool import Outcome, ProcessRecords
from millrace.bench.load.records import RequestTiming
from millrace.bench.measure.metrics import Samples, Summary

BUSY_SHARE = 0.85  # of a core: above this a process is late because it has no time left
TOLERANCE = {"p50": 0.02, "p99": 0.05}  # relative error of a latency
FLOOR_MS = 1.0  # smaller errors do not matter beside a server's latencies
_ON_TIME_MS = 0.5
_ON_TIME_SHARE = 0.05  # of the gaps: fewer that were read on time are not representative
_TARGET_SHARE = 0.5  # of a core: the share of a process when more processes are advised
_NO_CORES = (
    "client-bound: the load processes were mostly idle and still late, because other programs use "
    "the cores: run the load generator on a machine, or on cores, of its own"
)


_CONNECTING = 0.05  # of the requests' time: a larger share makes the rate the client's
_CONNECTIONS = (
    "client-bound: the server closes connections that could be used again; let it keep them open"
)


class ClientOverhead(msgspec.Struct, frozen=True, kw_only=True):
    """What the load generator cost. Shares are of a core; times are in ms, or in us by name.

    error_ms: how far TTFT and ITL may be off, by percentile. reasons: why the load generator
    limited the run, empty where it did not. advice: what to do about that. connect_share: of the
    requests' time, what opening connections took before their start.
    """

    processes: int
    cpu_share: float
    total_cpu_share: float
    us_per_chunk: float
    parse_us_per_chunk: float
    beacons: int
    lag_ms: dict[str, float]
    median_send_delay_ms: float
    p99_send_delay_ms: float
    max_send_delay_ms: float
    connect_share: float
    error_ms: dict[str, dict[str, float]]
    relative_error: dict[str, dict[str, float]]
    client_bound: bool
    reasons: list[str]
    advice: str | None


def measure_client(outcome: Outcome, summary: Summary, *, cores: int) -> ClientOverhead:
    """What the load generator cost in a run. cores: how many the load processes may use."""
    parts = outcome.parts
    shares = [part.cpu_s / part.wall_s if part.wall_s else 0.0 for part in parts]
    delays = [1e3 * record.send_delay for record in outcome.records] or [0.0]
    chunks = max(1, sum(len(record.chunk_ns) for record in outcome.records))
    errors = timing_errors(parts)
    relative = relative_errors(errors, summary)
    connecting = connect_share(outcome.records)
    reasons = bound_reasons(shares, errors, relative)
    return ClientOverhead(
        processes=len(shares),
        cpu_share=max(shares),
        total_cpu_share=sum(shares),
        us_per_chunk=1e6 * sum(part.cpu_s for part in parts) / chunks,
        parse_us_per_chunk=1e6 * sum(part.parse_s for part in parts) / chunks,
        beacons=sum(len(part.lag_ns) for part in parts),
        lag_ms=_quantiles(np.concatenate([np.asarray(part.lag_ns) / 1e6 for part in parts])),
        median_send_delay_ms=float(np.median(delays)),
        p99_send_delay_ms=float(np.percentile(delays, 99)),
        max_send_delay_ms=max(delays),
        connect_share=connecting,
        error_ms=errors,
        relative_error=relative,
        client_bound=bool(reasons) or connecting > _CONNECTING,
        reasons=reasons + _connect_reasons(connecting),
        advice=_advice(reasons, connecting, shares, cores),
    )


def timing_errors(parts: Sequence[ProcessRecords]) -> dict[str, dict[str, float]]:
    """How far off the percentiles of TTFT and ITL are, and the largest error of one, in ms."""
    first, first_late = [np.empty(0)], [np.empty(0)]
    gaps, gaps_late = [np.empty(0)], [np.empty(0)]
    for part in parts:
        if len(part.lag_ns) == 0:
            continue
        for record in part.records:
            if len(record.chunk_ns) and record.error is None:
                late = lateness(part, record.chunk_ns)
                times = np.asarray(record.chunk_ns, dtype=np.int64) - record.start_ns
                first.append(times[:1] / 1e6)
                first_late.append(late[:1])
                gaps.append(np.diff(times) / 1e6)
                gaps_late.append(np.maximum(late[:-1], late[1:]))
    seen, late = np.concatenate(first), np.concatenate(first_late)
    seen_gaps, late_gaps = np.concatenate(gaps), np.concatenate(gaps_late)
    # How late the two ends of a gap were is known only roughly, so correcting gaps would add noise.
    # The gaps of which neither end was late are right as they are.
    on_time = seen_gaps[late_gaps <= _ON_TIME_MS]
    enough = len(on_time) >= _ON_TIME_SHARE * len(seen_gaps)
    return {
        "ttft": _figure_errors(seen, seen - late, late),
        "itl": _figure_errors(seen_gaps, on_time if enough else seen_gaps - late_gaps, late_gaps),
    }


def _figure_errors(seen: Samples, other: Samples, late: Samples) -> dict[str, float]:
    """The differences between the percentiles of both; max: the largest lateness."""
    here, there = _quantiles(seen), _quantiles(other)
    most = float(np.abs(late).max()) if len(late) else 0.0
    return {**{p: abs(here[p] - there[p]) for p in ("p50", "p99")}, "max": most}


def lateness(part: ProcessRecords, times: Sequence[int]) -> Samples:
    """How late (ms) the clock was read at each of these times: as late as the next beacon, or, if
    that is more, what is left of the backlog at the last beacons, which were read together."""
    read, at = np.asarray(part.read_ns), np.asarray(times)
    late: Samples = np.asarray(part.lag_ns, dtype=np.float64) / 1e6
    after = np.searchsorted(read, at)
    before = np.searchsorted(read, read[np.maximum(after - 1, 0)])  # the oldest beacon read then
    backlog: Samples = late[before] - np.maximum(at - read[before], 0) / 1e6
    following: Samples = late[np.minimum(after, len(late) - 1)]
    known: Samples = np.maximum(following, np.where(after > 0, backlog, 0.0))
    return known


def _quantiles(values: Any) -> dict[str, float]:
    if len(values) == 0:
        return {"p50": 0.0, "p99": 0.0, "max": 0.0}
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": float(p50), "p99": float(p99), "max": float(values.max())}


def relative_errors(
    errors: Mapping[str, Mapping[str, float]], summary: Summary
) -> dict[str, dict[str, float]]:
    """The errors relative to the reported figures: that of the median to the median, that of the
    99th percentile to the largest percentile that is reported."""
    relative: dict[str, dict[str, float]] = {}
    for name, error in errors.items():
        seen = summary.overall.latencies[name]
        tail = max(seen.percentiles.values(), default=seen.median)
        relative[name] = {
            "p50": error["p50"] / seen.median if seen.median > 0 else 0.0,
            "p99": error["p99"] / tail if tail > 0 else 0.0,
        }
    return relative


def bound_reasons(
    shares: Sequence[float],
    errors: Mapping[str, Mapping[str, float]],
    relative: Mapping[str, Mapping[str, float]],
) -> list[str]:
    """Why the load generator limited the run; empty when it did not."""
    reasons = []
    if max(shares) > BUSY_SHARE:
        reasons.append(f"a load process used {max(shares):.0%} of a core")
    for name in errors:
        for figure, most in TOLERANCE.items():
            error, share = errors[name][figure], relative[name][figure]
            if error > FLOOR_MS and share > most:
                reasons.append(
                    f"{name.upper()} {figure} may be off by {error:.1f} ms ({share:.0%})"
                )
    return reasons


def connect_share(records: Sequence[RequestTiming]) -> float:
    """The share of the requests' time that went into opening connections, before their start."""
    connecting = sum(record.connect_ns for record in records)
    total = connecting + sum(record.end_ns - record.start_ns for record in records)
    return connecting / total if total > 0 else 0.0


def _connect_reasons(share: float) -> list[str]:
    if share <= _CONNECTING:
        return []
    return [f"opening connections took {share:.0%} of the requests' time, before their start"]


def _advice(
    reasons: Sequence[str], connecting: float, shares: Sequence[float], cores: int
) -> str | None:
    """What would help; None where nothing limited the run."""
    if reasons:
        return _NO_CORES if max(shares) < _TARGET_SHARE else advice(shares, cores)
    return _CONNECTIONS if connecting > _CONNECTING else None


def advice(shares: Sequence[float], cores: int) -> str:
    """How many load processes would be enough, as a flag."""
    needed = max(2 * len(shares), math.ceil(sum(shares) / _TARGET_SHARE))
    line = f"client-bound: use --processes {needed}"
    return line if needed <= cores else f"{line}, on a machine of its own with as many cores"
