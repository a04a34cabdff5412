"""The generator measured by itself: what it cost, how late it was, what error follows from that.

Beacons are times written to each load process while it sends. How late one is read is how late the
clock would have been read for a chunk that came at that moment. So the lateness of beacons is the
error of TTFT (its first chunk is stamped that late), and the difference of two is that of a gap.
Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from millrace.bench.metrics import Summary
from millrace.bench.pool import Outcome

BUSY = 0.85  # of a core: from here on a process is late for want of time
TOLERANCE = {"p50": 0.02, "p99": 0.05}  # relative error of a latency
FLOOR_MS = 1.0  # an error below this is none that a server's figures could show
_COMFORT = 0.5  # of a core: what a process is to have when more of them are advised
_STARVED = (
    "client-bound: its processes had little to do and were late all the same, because others use "
    "the cores: give the client a machine, or cores, of its own"
)


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """What the generator cost. Shares are of a core, times in ms unless they say us.

    error_ms: how far TTFT and ITL may be off, by percentile. reasons: why it bounded the run, none
    where it did not; advice: what to do then.
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
    error_ms: dict[str, dict[str, float]]
    relative_error: dict[str, dict[str, float]]
    client_bound: bool
    reasons: list[str]
    advice: str | None


def measure_client(outcome: Outcome, summary: Summary, *, cores: int) -> Client:
    """What the generator cost in a run. cores: that the load processes may use."""
    pairs = zip(outcome.cpu_s, outcome.wall_s, strict=True)
    shares = [cpu / wall if wall else 0.0 for cpu, wall in pairs]
    lags = [np.asarray(lag, dtype=np.float64) / 1e6 for lag in outcome.lags_ns]
    delays = [1e3 * record.send_delay for record in outcome.records] or [0.0]
    chunks = max(1, sum(len(record.chunk_ns) for record in outcome.records))
    errors = timing_errors(lags)
    relative = relative_errors(errors, summary)
    reasons = bound_reasons(shares, errors, relative)
    starved = bool(reasons) and max(shares) < _COMFORT
    return Client(
        processes=len(shares),
        cpu_share=max(shares),
        total_cpu_share=sum(shares),
        us_per_chunk=1e6 * sum(outcome.cpu_s) / chunks,
        parse_us_per_chunk=1e6 * sum(outcome.parse_s) / chunks,
        beacons=sum(len(lag) for lag in lags),
        lag_ms=_quantiles(np.concatenate(lags)),
        median_send_delay_ms=float(np.median(delays)),
        p99_send_delay_ms=float(np.percentile(delays, 99)),
        max_send_delay_ms=max(delays),
        error_ms=errors,
        relative_error=relative,
        client_bound=bool(reasons),
        reasons=reasons,
        advice=(_STARVED if starved else advice(shares, cores)) if reasons else None,
    )


def timing_errors(lags: Sequence[Any]) -> dict[str, dict[str, float]]:
    """From the lateness of beacons (ms, by process): the error of TTFT, and that of a gap, which
    is the difference of two latenesses in one process."""
    gaps = [np.abs(np.diff(lag)) for lag in lags]
    return {"ttft": _quantiles(np.concatenate(lags)), "itl": _quantiles(np.concatenate(gaps))}


def _quantiles(values: Any) -> dict[str, float]:
    if len(values) == 0:
        return {"p50": 0.0, "p99": 0.0, "max": 0.0}
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": float(p50), "p99": float(p99), "max": float(values.max())}


def relative_errors(
    errors: Mapping[str, Mapping[str, float]], summary: Summary
) -> dict[str, dict[str, float]]:
    """The errors, each relative to the reported figure: the median's to the median, the 99th
    percentile's to the largest percentile that was asked for."""
    relative: dict[str, dict[str, float]] = {}
    for name, error in errors.items():
        seen = summary.whole.latencies[name]
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
    """Why the client bounded the run; none when it did not."""
    reasons = []
    if max(shares) > BUSY:
        reasons.append(f"a load process used {max(shares):.0%} of a core")
    for name in errors:
        for figure, most in TOLERANCE.items():
            error, share = errors[name][figure], relative[name][figure]
            if error > FLOOR_MS and share > most:
                reasons.append(
                    f"{name.upper()} {figure} may be off by {error:.1f} ms ({share:.0%})"
                )
    return reasons


def advice(shares: Sequence[float], cores: int) -> str:
    """How many processes would carry the load, as a flag."""
    needed = max(2 * len(shares), math.ceil(sum(shares) / _COMFORT))
    line = f"client-bound: use --processes {needed}"
    return line if needed <= cores else f"{line}, on a machine of its own with as many cores"
