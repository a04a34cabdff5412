"""What a replica did in one second: the figures that the live page shows, and their sums.

A sample has counts of its second and levels at its end, so samples of several replicas, or of
several seconds, add up to a sample again. Where the figures come from is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

Buckets = list[tuple[int, int]]  # (number of a bucket, values in it); buckets without any are left

_FINE = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04)
_TOKEN = (
    *_FINE, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
# Upper bounds of the buckets of latencies, in seconds; one more bucket has all above the last. They
# are those of the metrics page.
BOUNDS: Mapping[str, tuple[float, ...]] = {
    "ttft": tuple(sorted((
        *_FINE, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
        640.0, 2560.0,
    ))),
    "itl": tuple(sorted(_TOKEN)),
    "tpot": tuple(sorted(_TOKEN)),
}  # fmt: skip
STEP_KINDS = ("decode", "prefill", "mixed")


class Sample(msgspec.Struct, array_like=True, kw_only=True):
    """at: the end of its second, in seconds since 1970. Levels are those of that moment.

    tokens_in, tokens_out: prompt tokens taken in, tokens generated. pages, states: used and there
    are. queries, hits: prompt tokens looked up, and found. accepted: draft tokens by position.
    steps: of each of STEP_KINDS the number, their seconds, and seconds in which the device waited
    for the host. ttft, itl, tpot: values by bucket of BOUNDS. power: watts of all GPUs; clock: MHz,
    a mean. ended, failed: requests.
    """

    at: int
    tokens_in: int = 0
    tokens_out: int = 0
    running: int = 0
    waiting: int = 0
    pages: tuple[int, int] = (0, 0)
    states: tuple[int, int] = (0, 0)
    queries: int = 0
    hits: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted: list[int] = []
    steps: list[float] = []
    ttft: Buckets = []
    itl: Buckets = []
    tpot: Buckets = []
    power: float = 0.0
    clock: float = 0.0
    ended: int = 0
    failed: int = 0


FIELDS = Sample.__struct_fields__
_COUNTS = (
    *("tokens_in", "tokens_out", "queries", "hits", "drafts", "draft_tokens", "ended", "failed"),
)
_LEVELS = ("running", "waiting", "power")


def of_replicas(at: int, samples: Sequence[Sample]) -> Sample:
    """One second of several replicas together."""
    whole = _counted(at, samples)
    for name in _LEVELS:
        setattr(whole, name, sum(getattr(sample, name) for sample in samples))
    whole.pages = _pairs([sample.pages for sample in samples])
    whole.states = _pairs([sample.states for sample in samples])
    clocks = [sample.clock for sample in samples if sample.clock]
    whole.clock = round(sum(clocks) / len(clocks)) if clocks else 0.0
    return whole


def of_seconds(samples: Sequence[Sample]) -> Sample:
    """Several seconds of one replica, which come in their order: levels are those at the end. A
    single one is its own sum."""
    last = samples[-1]
    if len(samples) == 1:
        return last
    whole = _counted(last.at, samples)
    for name in (*_LEVELS, "pages", "states", "clock"):
        setattr(whole, name, getattr(last, name))
    return whole


def _counted(at: int, samples: Sequence[Sample]) -> Sample:
    whole = Sample(at=at)
    for name in _COUNTS:
        setattr(whole, name, sum(getattr(sample, name) for sample in samples))
    whole.accepted = [int(value) for value in _lists([sample.accepted for sample in samples])]
    whole.steps = [round(value, 6) for value in _lists([sample.steps for sample in samples])]
    for name in ("ttft", "itl", "tpot"):
        setattr(whole, name, _buckets(getattr(sample, name) for sample in samples))
    return whole


def _pairs(pairs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(used for used, _ in pairs), sum(there for _, there in pairs)


def _lists(lists: Sequence[Sequence[float]]) -> list[float]:
    """Element by element; a shorter list has zeros at its end."""
    whole = [0.0] * max(map(len, lists), default=0)
    for one in lists:
        for index, value in enumerate(one):
            whole[index] += value
    return whole


def _buckets(some: Iterable[Buckets]) -> Buckets:
    counts: dict[int, int] = {}
    for buckets in some:
        for index, count in buckets:
            counts[index] = counts.get(index, 0) + count
    return sorted(counts.items())
