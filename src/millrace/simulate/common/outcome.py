"""What a simulated run brought: records of requests, figures of them, and time lines.

Latencies are those that `millrace bench` measures, at the client. This module knows no clock.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

PERCENTILES = (50.0, 90.0, 99.0)
_BUCKETS_PER_FACTOR_E = 50  # of the histogram of gaps: each is 2% wide
_LEAST_GAP = 1e-6


class Gaps:
    """A histogram of the times between chunks, with buckets of 2%."""

    def __init__(self) -> None:
        self._counts = np.zeros(64 * _BUCKETS_PER_FACTOR_E, dtype=np.int64)
        self.count = 0
        self.sum = 0.0
        self._latest: tuple[float, int] = (-1.0, 0)

    def add(self, seconds: float) -> None:
        """One gap. Those of one step are mostly the same, so their bucket is not looked up anew."""
        if seconds != self._latest[0]:
            self._latest = seconds, _bucket(seconds)
        self._counts[self._latest[1]] += 1
        self.count += 1
        self.sum += seconds

    def add_many(self, seconds: np.ndarray, counts: np.ndarray) -> None:
        """Gaps, and how often each came."""
        at = np.log(np.maximum(seconds, _LEAST_GAP) / _LEAST_GAP) * _BUCKETS_PER_FACTOR_E
        np.add.at(self._counts, np.minimum(at.astype(np.int64), len(self._counts) - 1), counts)
        self.count += int(counts.sum())
        self.sum += float((seconds * counts).sum())

    def percentile(self, percent: float) -> float:
        """Seconds; 0 without gaps."""
        if not self.count:
            return 0.0
        at = int(np.searchsorted(np.cumsum(self._counts), percent / 100 * self.count))
        return float(_LEAST_GAP * math.exp((at + 0.5) / _BUCKETS_PER_FACTOR_E))


def _bucket(seconds: float) -> int:
    at = math.log(max(seconds, _LEAST_GAP) / _LEAST_GAP) * _BUCKETS_PER_FACTOR_E
    return min(int(at), 64 * _BUCKETS_PER_FACTOR_E - 1)


class Records:
    """All requests of a run, one entry each in every array; times in seconds, -1 for never.

    due: when the client wanted to send it; sent: when it did. replica: the last one's id.
    """

    def __init__(self) -> None:
        self.due, self.sent = array("d"), array("d")
        self.first, self.ended = array("d"), array("d")
        self.prompt, self.output, self.cached = array("l"), array("l"), array("l")
        self.replica, self.turn = array("l"), array("l")
        self.chunks, self.resumptions = array("l"), array("l")
        self.errors: list[str] = []
        self.gaps = Gaps()
        self.tokens = TimeLine()  # output tokens at the client

    def __len__(self) -> int:
        return len(self.due)

    @classmethod
    def of(
        cls,
        times: Mapping[str, np.ndarray],
        counts: Mapping[str, np.ndarray],
        failed: np.ndarray,
        gaps: Gaps,
        tokens: TimeLine,
    ) -> Records:
        """Records from columns; those that are not given are zeros."""
        made = cls()
        zeros = np.zeros(len(failed), dtype=np.int64)
        for name in ("prompt", "output", "cached", "replica", "turn", "chunks", "resumptions"):
            setattr(made, name, counts.get(name, zeros))
        for name, values in times.items():
            setattr(made, name, values)
        made.errors = ["failed" if one else "" for one in failed.tolist()]
        made.gaps, made.tokens = gaps, tokens
        return made

    def add(self, due: float, sent: float, prompt: int, turn: int) -> RequestRecord:
        """A request that is sent now."""
        for values in (self.first, self.ended):
            values.append(-1.0)
        for counts in (self.output, self.cached, self.chunks, self.resumptions):
            counts.append(0)
        self.due.append(due)
        self.sent.append(sent)
        self.prompt.append(prompt)
        self.turn.append(turn)
        self.replica.append(-1)
        self.errors.append("")
        return RequestRecord(self, len(self) - 1)


class RequestRecord:
    """One request while it runs."""

    __slots__ = ("_at", "_latest", "_records")

    def __init__(self, records: Records, at: int) -> None:
        self._records, self._at = records, at
        self._latest = -1.0

    @property
    def replica(self) -> int:
        return self._records.replica[self._at]

    @replica.setter
    def replica(self, id: int) -> None:
        self._records.replica[self._at] = id

    @property
    def cached_tokens(self) -> int:
        return self._records.cached[self._at]

    @cached_tokens.setter
    def cached_tokens(self, count: int) -> None:
        self._records.cached[self._at] = count

    @property
    def resumptions(self) -> int:
        return self._records.resumptions[self._at]

    @resumptions.setter
    def resumptions(self, count: int) -> None:
        self._records.resumptions[self._at] = count

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return bool(self._records.errors[self._at])

    def chunk(self, at: float, tokens: int) -> None:
        """So many tokens reach the client at that moment."""
        records, index = self._records, self._at
        if self._latest < 0:
            records.first[index] = at
        else:
            records.gaps.add(at - self._latest)
        self._latest = at
        records.output[index] += tokens
        records.chunks[index] += 1
        records.tokens.add(at, tokens)

    def end(self, at: float, error: str) -> None:
        """The request has ended, with an error or none."""
        self._records.ended[self._at] = at
        self._records.errors[self._at] = error


class TimeLine:
    """Sums of what comes at moments, for each second of a run."""

    def __init__(self) -> None:
        self.values = array("d")

    def add(self, at: float, value: float) -> None:
        second = int(at)
        while len(self.values) <= second:
            self.values.append(0.0)
        self.values[second] += value

    def add_many(self, at: np.ndarray, values: np.ndarray) -> None:
        """The same for several moments."""
        if len(at):
            seconds = at.astype(np.int64)
            first = int(seconds.min())
            sums = np.bincount(seconds - first, values)
            for second in np.flatnonzero(sums).tolist():
                self.add(float(first + second), float(sums[second]))

    def between(self, begin: float, end: float) -> float:
        """The sum from one moment to another; of seconds in part, a share."""
        total = 0.0
        for second in range(int(begin), min(len(self.values), math.ceil(end))):
            share = min(end, second + 1) - max(begin, second)
            total += self.values[second] * share
        return total


class Sample(msgspec.Struct, frozen=True):
    """The fleet at a moment: replicas that take requests, start, and drain; requests that run,
    wait at engines, and wait at the gateway; KV pages in use, as a share."""

    at: float
    up: int
    starting: int
    draining: int
    running: int
    waiting: int
    queued: int
    kv_used: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a run brought. seconds: simulated; wall_seconds: that it took. ended: whether every
    request has ended. counts: of what happened, by name. busy: share of their time that replicas
    computed."""

    records: Records
    samples: list[Sample]
    seconds: float
    wall_seconds: float
    ended: bool
    replica_seconds: float
    counts: dict[str, int]
    busy: float
    mode: str = "event"


class Latency(msgspec.Struct, frozen=True):
    """Seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a window of a run. Rates are per second.

    sent: requests sent in it; completed, failed: those that ended in it. in_flight: their mean
    number. cached: the share of prompt tokens from prefix caches. good: completed within all
    objectives, per second; None without objectives.
    """

    seconds: float
    sent: int
    completed: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    requests_rate: float
    output_rate: float
    total_rate: float
    in_flight: float
    cached: float
    ttft: Latency
    tpot: Latency
    itl: Latency
    e2el: Latency
    good: float | None = None


def figures(
    records: Records, begin: float, end: float, objectives: dict[str, float] | None = None
) -> Figures:
    """The figures of the requests that ended from `begin` to `end`.

    objectives: milliseconds by latency, as of `--goodput`.
    """
    due, first, ended = (np.array(a) for a in (records.due, records.first, records.ended))
    output, prompt = np.array(records.output), np.array(records.prompt)
    failed = np.array([bool(error) for error in records.errors], dtype=bool)
    inside = (ended >= begin) & (ended <= end)
    done = inside & ~failed
    seconds = max(end - begin, 1e-9)
    ttft, e2el = (first - due)[done], (ended - due)[done]
    several = done & (output > 1)
    tpot = (ended - first)[several] / (output[several] - 1)
    gone = np.where(ended < 0, end, np.minimum(ended, end))
    residence = np.clip(gone - np.maximum(np.array(records.sent), begin), 0.0, None).sum()
    prompts, outputs = int(prompt[done].sum()), int(output[done].sum())
    return Figures(
        seconds=seconds,
        sent=int(((np.array(records.sent) >= begin) & (np.array(records.sent) <= end)).sum()),
        completed=int(done.sum()),
        failed=int((inside & failed).sum()),
        prompt_tokens=prompts,
        output_tokens=outputs,
        requests_rate=float(done.sum()) / seconds,
        output_rate=outputs / seconds,
        total_rate=(prompts + outputs) / seconds,
        in_flight=float(residence) / seconds,
        cached=float(np.array(records.cached)[done].sum()) / max(1, prompts),
        ttft=latency(ttft),
        tpot=latency(tpot),
        itl=Latency(
            records.gaps.sum / max(1, records.gaps.count),
            *(records.gaps.percentile(percent) for percent in PERCENTILES),
        ),
        e2el=latency(e2el),
        good=_good(objectives, done, due, first, ended, output, seconds),
    )


def latency(values: np.ndarray) -> Latency:
    """Of measured values; zeros of none."""
    if not len(values):
        return Latency(0.0, 0.0, 0.0, 0.0)
    return Latency(float(values.mean()), *(float(np.percentile(values, p)) for p in PERCENTILES))


def _good(
    objectives: dict[str, float] | None,
    done: np.ndarray,
    due: np.ndarray,
    first: np.ndarray,
    ended: np.ndarray,
    output: np.ndarray,
    seconds: float,
) -> float | None:
    if not objectives:
        return None
    values = {
        "ttft": first - due,
        "tpot": (ended - first) / np.maximum(output - 1, 1),
        "e2el": ended - due,
    }
    met = done.copy()
    for name, limit in objectives.items():
        met &= values[name] <= limit / 1e3
    return float(met.sum()) / seconds


def samples_mean(samples: Sequence[Sample], name: str) -> float:
    """The mean of one field over a run; 0 without samples."""
    return sum(float(getattr(one, name)) for one in samples) / len(samples) if samples else 0.0
