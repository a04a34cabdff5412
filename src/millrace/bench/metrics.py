"""The formulas: from what was recorded of each request to the figures of a run.

Pure functions over `Record`s; no clock, no network. The definitions and the names in result files
are those of `vllm bench serve`. Times in records are ns of one monotonic clock, so the records of
several processes on a host can be pooled; percentiles are always taken over pooled samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import msgspec
import numpy as np

LATENCIES = ("ttft", "tpot", "itl", "e2el")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of one request.

    scheduled_ns: when it was due; start_ns: just before it was written to its connection;
    chunk_ns: when each chunk that carries a choice arrived; end_ns: when the stream had ended.
    input_tokens and output_tokens: as the server counted them (`usage`), or, where it does not
    say, as sent and as chunks (`counted` is then False). error: None for a success.
    """

    index: int
    scheduled_ns: int
    start_ns: int
    end_ns: int
    chunk_ns: list[int]
    input_tokens: int
    output_tokens: int
    counted: bool = True
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds from start to the first chunk that carries a choice."""
        return (self.chunk_ns[0] - self.start_ns) / 1e9

    @property
    def e2el(self) -> float:
        """Seconds from start to the last chunk that carries a choice."""
        return (self.chunk_ns[-1] - self.start_ns) / 1e9

    @property
    def tpot(self) -> float | None:
        """Seconds an output token after the first; None for fewer than two tokens."""
        if self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)

    @property
    def itls(self) -> list[float]:
        """Seconds between neighbouring chunks."""
        return [(b - a) / 1e9 for a, b in pairwise(self.chunk_ns)]


class Distribution(msgspec.Struct, frozen=True):
    """Of a set of samples, in the samples' unit; all zero when there are none."""

    count: int
    mean: float
    median: float
    std: float
    percentiles: dict[float, float]


class Window(msgspec.Struct, frozen=True):
    """Figures over one stretch of time. Latencies in ms, throughput a second.

    Tokens count where they arrive: those of a prompt with its first chunk, those of an answer
    spread evenly over its chunks.
    """

    duration: float
    completed: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    latencies: dict[str, Distribution]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a run: `whole` from first dispatch to last completion, of successes only.

    steady: the stretch in which concurrency was full, without ramp and drain; None where an
    arrival rate sets the load, or where full concurrency was not held for any time.
    goodput: requests a second that met every objective, None without objectives.
    """

    whole: Window
    steady: Window | None
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    peak_concurrency: int
    goodput: float | None


def distribution(samples: Sequence[float], percentiles: Iterable[float]) -> Distribution:
    """Mean, median, population std and linearly interpolated percentiles (0..100)."""
    wanted = list(percentiles)
    if not samples:
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


def successes(records: Iterable[Record]) -> list[Record]:
    """The records that count: no error, and at least one chunk."""
    return [r for r in records if r.error is None and r.chunk_ns]


def span(records: Sequence[Record]) -> tuple[int, int]:
    """First dispatch and last completion in ns, failures included; (0, 0) for no records."""
    if not records:
        return 0, 0
    return min(r.start_ns for r in records), max(r.end_ns for r in records)


def peak_concurrency(records: Iterable[Record]) -> int:
    """The most requests that were in flight at once."""
    return max((level for _, level in _levels(records)), default=0)


def full_window(records: Sequence[Record], level: int) -> tuple[int, int] | None:
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


def _levels(records: Iterable[Record]) -> list[tuple[int, int]]:
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


def whole_window(records: Sequence[Record], percentiles: Sequence[float]) -> Window:
    """The run as a whole, over its successes."""
    done = successes(records)
    begin, end = span(records)
    tpots = [t for r in done if (t := r.tpot) is not None]
    return _window(
        (end - begin) / 1e9,
        len(done),
        sum(r.output_tokens for r in done),
        sum(r.input_tokens for r in done),
        {
            "ttft": [r.ttft for r in done],
            "tpot": tpots,
            "itl": [gap for r in done for gap in r.itls],
            "e2el": [r.e2el for r in done],
        },
        percentiles,
    )


def partial_window(
    records: Sequence[Record], begin: int, end: int, percentiles: Sequence[float]
) -> Window:
    """What arrived in [begin, end) ns.

    A TTFT counts where its first chunk came, a gap where it ended, TPOT and E2EL where the last
    chunk came.
    """
    output, prompt, finished = 0.0, 0, 0
    samples: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for record in successes(records):
        inside = [begin <= at < end for at in record.chunk_ns]
        output += record.output_tokens * sum(inside) / len(inside)
        samples["itl"] += [gap for gap, kept in zip(record.itls, inside[1:], strict=True) if kept]
        if inside[0]:
            prompt += record.input_tokens
            samples["ttft"].append(record.ttft)
        if inside[-1]:
            finished += 1
            samples["e2el"].append(record.e2el)
            if record.tpot is not None:
                samples["tpot"].append(record.tpot)
    return _window((end - begin) / 1e9, finished, output, prompt, samples, percentiles)


def _window(
    duration: float,
    completed: int,
    output: float,
    prompt: float,
    samples: Mapping[str, Sequence[float]],
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
            name: distribution([1e3 * value for value in values], percentiles)
            for name, values in samples.items()
        },
    )


def meets(record: Record, objectives: Mapping[str, float]) -> bool:
    """Whether a success is within every objective (ms, by name: ttft, tpot, e2el).

    A request without a TPOT, having one token, meets any.
    """
    seen = {"ttft": record.ttft, "e2el": record.e2el, "tpot": record.tpot or 0.0}
    return all(1e3 * seen[name] <= limit for name, limit in objectives.items())


def summarize(
    records: Sequence[Record],
    *,
    percentiles: Sequence[float] = (99.0,),
    objectives: Mapping[str, float] | None = None,
    steady_level: int | None = None,
) -> Summary:
    """The figures of a run.

    steady_level: the concurrency that counts as full, None for no steady window.
    """
    done = successes(records)
    whole = whole_window(records, percentiles)
    window = full_window(records, steady_level) if steady_level else None
    good = sum(meets(r, objectives) for r in done) if objectives else 0
    return Summary(
        whole=whole,
        steady=partial_window(records, *window, percentiles) if window else None,
        failed=len(records) - len(done),
        total_input_tokens=sum(r.input_tokens for r in done),
        total_output_tokens=sum(r.output_tokens for r in done),
        peak_concurrency=peak_concurrency(records),
        goodput=(good / whole.duration if whole.duration else 0.0) if objectives else None,
    )
