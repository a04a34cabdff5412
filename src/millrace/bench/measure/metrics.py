"""The formulas: from the records of requests to the figures of a run.

Pure functions; no clock, no network. The definitions, and the names in result files, are those of
`vllm bench serve`. Percentiles are always taken over the pooled samples of all load processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from millrace.bench.load.records import RequestTiming

Samples = NDArray[np.float64]

LATENCIES = ("ttft", "tpot", "itl", "e2el")


class Distribution(msgspec.Struct, frozen=True):
    """Of a set of samples, in the samples' unit; all zero when there are none."""

    count: int
    mean: float
    median: float
    std: float
    percentiles: dict[float, float]


class Window(msgspec.Struct, frozen=True):
    """Figures over an interval of time. Latencies in ms, throughput per second.

    Tokens count when they arrive: those of a prompt with the first chunk, those of an answer spread
    evenly over its chunks.
    """

    duration: float
    completed: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    latencies: dict[str, Distribution]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a run: `overall` from first dispatch to last completion, of successes only.

    steady: the interval in which concurrency was full, without ramp-up and drain; None where an
    arrival rate sets the load, or where full concurrency was never reached.
    goodput: requests a second that met every objective, None without objectives.
    """

    overall: Window
    steady: Window | None
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    peak_concurrency: int
    goodput: float | None


def distribution(samples: Sequence[float] | Samples, percentiles: Iterable[float]) -> Distribution:
    """Mean, median, population std and linearly interpolated percentiles (0..100)."""
    wanted = list(percentiles)
    if len(samples) == 0:
        return Distribution(0, 0.0, 0.0, 0.0, dict.fromkeys(wanted, 0.0))
    values = np.asarray(samples, dtype=np.float64)
    found = np.percentile(values, wanted, method="linear")
    return Distribution(
        count=len(samples),
        mean=float(values.mean()),
        median=float(np.median(values)),
        std=float(values.std()),
        percentiles={p: float(v) for p, v in zip(wanted, found, strict=True)},
    )


def successes(records: Iterable[RequestTiming]) -> list[RequestTiming]:
    """The successful records: no error, and at least one chunk."""
    return [r for r in records if r.error is None and r.chunk_ns]


def span(records: Sequence[RequestTiming]) -> tuple[int, int]:
    """First dispatch and last completion in ns, failures included; (0, 0) for no records."""
    if not records:
        return 0, 0
    return min(r.start_ns for r in records), max(r.end_ns for r in records)


def peak_concurrency(records: Iterable[RequestTiming]) -> int:
    """The most requests that were in flight at once."""
    return max((level for _, level in _levels(records)), default=0)


def full_concurrency_window(records: Sequence[RequestTiming], level: int) -> tuple[int, int] | None:
    """From the first moment with `level` requests in flight to the last one, in ns.

    In a closed loop concurrency dips for microseconds between an answer and the next request;
    such dips lie inside the window. None when `level` was never held for any time.
    """
    steps = _levels(records)
    reached = [i for i, (_, at_once) in enumerate(steps) if at_once >= level]
    if not reached or reached[-1] + 1 >= len(steps):
        return None
    begin, end = steps[reached[0]][0], steps[reached[-1] + 1][0]
    return (begin, end) if end > begin else None


def _levels(records: Iterable[RequestTiming]) -> list[tuple[int, int]]:
    """(time, requests in flight from then on), in order of time."""
    edges: list[tuple[int, int]] = []
    for record in records:
        edges += [(record.start_ns, 1), (record.end_ns, -1)]
    edges.sort()  # an end comes before a start of the same moment
    levels, current = [], 0
    for at, change in edges:
        current += change
        levels.append((at, current))
    return levels


def overall_window(records: Sequence[RequestTiming], percentiles: Sequence[float]) -> Window:
    """The figures of the whole run, over its successes."""
    done = successes(records)
    begin, end = span(records)
    return _window(
        (end - begin) / 1e9,
        len(done),
        sum(r.output_tokens for r in done),
        sum(r.input_tokens for r in done),
        {
            "ttft": [r.ttft for r in done],
            "tpot": [t for r in done if (t := r.tpot) is not None],
            "itl": pooled_gaps(done),
            "e2el": [r.e2el for r in done],
        },
        percentiles,
    )


def pooled_gaps(records: Iterable[RequestTiming]) -> Samples:
    """Seconds between neighbouring chunks of each request, those of all requests together."""
    gaps = [np.diff(_times(r)) for r in records]
    return np.concatenate(gaps) / 1e9 if gaps else np.empty(0)


def _times(record: RequestTiming) -> NDArray[np.int64]:
    return np.asarray(record.chunk_ns, dtype=np.int64)


def partial_window(
    records: Sequence[RequestTiming], begin: int, end: int, percentiles: Sequence[float]
) -> Window:
    """What arrived in [begin, end) ns.

    A TTFT counts where its first chunk came, a gap where it ended, TPOT and E2EL where the last
    chunk came.
    """
    output, prompt, finished = 0.0, 0, 0
    samples: dict[str, list[float]] = {name: [] for name in LATENCIES}
    gaps: list[Samples] = []
    for record in successes(records):
        times = _times(record)
        inside = (begin <= times) & (times < end)
        output += record.output_tokens * float(inside.mean())
        gaps.append(np.diff(times)[inside[1:]] / 1e9)
        if inside[0]:
            prompt += record.input_tokens
            samples["ttft"].append(record.ttft)
        if inside[-1]:
            finished += 1
            samples["e2el"].append(record.e2el)
            if record.tpot is not None:
                samples["tpot"].append(record.tpot)
    pooled: dict[str, Sequence[float] | Samples] = {**samples}
    pooled["itl"] = np.concatenate(gaps) if gaps else np.empty(0)
    return _window((end - begin) / 1e9, finished, output, prompt, pooled, percentiles)


def _window(
    duration: float,
    completed: int,
    output: float,
    prompt: float,
    samples: Mapping[str, Sequence[float] | Samples],
    percentiles: Sequence[float],
) -> Window:
    def rate(amount: float) -> float:
        return amount / duration if duration > 0 else 0.0

    return Window(
        duration=duration,
        completed=completed,
        request_throughput=rate(completed),
        output_throughput=rate(output),
        total_token_throughput=rate(output + prompt),
        latencies={
            name: distribution(1e3 * np.asarray(values, dtype=np.float64), percentiles)
            for name, values in samples.items()
        },
    )


def meets(record: RequestTiming, objectives: Mapping[str, float]) -> bool:
    """Whether a success is within every objective (ms, by name: ttft, tpot, e2el).

    A request of one token has no TPOT and meets any objective of it.
    """
    seen = {"ttft": record.ttft, "e2el": record.e2el, "tpot": record.tpot or 0.0}
    return all(1e3 * seen[name] <= limit for name, limit in objectives.items())


def summarize(
    records: Sequence[RequestTiming],
    *,
    percentiles: Sequence[float] = (99.0,),
    objectives: Mapping[str, float] | None = None,
    steady_level: int | None = None,
) -> Summary:
    """The figures of a run.

    steady_level: the concurrency that counts as full, None for no steady window.
    """
    done = successes(records)
    overall = overall_window(records, percentiles)
    window = full_concurrency_window(records, steady_level) if steady_level else None
    good = sum(meets(r, objectives) for r in done) if objectives else 0
    return Summary(
        overall=overall,
        steady=partial_window(records, *window, percentiles) if window else None,
        failed=len(records) - len(done),
        total_input_tokens=sum(r.input_tokens for r in done),
        total_output_tokens=sum(r.output_tokens for r in done),
        peak_concurrency=peak_concurrency(records),
        goodput=(good / overall.duration if overall.duration else 0.0) if objectives else None,
    )
