"""The gateway's policies over arrays of loads. A test compares each with the one that serves.

They see what those see: tokens of load and the weight of each replica. Prompts share no prefix
here, so a prefix-aware policy picks the least loaded replica.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from hashlib import blake2b

import numpy as np

from millrace.target import Target


class Loads:
    """Replicas that take requests. rows: ascending; load: tokens; weight: None: all are equal.
    place: row -> its place among the rows, if the caller has it already."""

    __slots__ = ("_place", "load", "rows", "weight")

    def __init__(
        self,
        rows: np.ndarray,
        load: np.ndarray,
        weight: np.ndarray | None,
        place: dict[int, int] | None = None,
    ) -> None:
        self.rows, self.load, self.weight, self._place = rows, load, weight, place

    @property
    def place(self) -> dict[int, int]:
        if self._place is None:
            self._place = places(self.rows)
        return self._place

    def add(self, row: int, tokens: int) -> None:
        """Count tokens at a replica, if it is one of these."""
        at = self.place.get(row)
        if at is not None:
            self.load[at] += tokens

    def where(self, chosen: np.ndarray) -> Loads:
        """Some of them."""
        weight = None if self.weight is None else self.weight[chosen]
        return Loads(self.rows[chosen], self.load[chosen], weight)

    def after(self, prompt: int) -> np.ndarray:
        """The load of each with a prompt of so many tokens more, for its weight."""
        if self.weight is None:
            return self.load
        found: np.ndarray = (self.load + prompt) / self.weight
        return found


def places(rows: np.ndarray) -> dict[int, int]:
    """row -> its place."""
    return {row: at for at, row in enumerate(rows.tolist())}


Pick = Callable[[Loads, int, int], int]  # loads, tokens of the prompt, number of the request


class LeastLoaded:
    """As in `millrace.gateway.routing.policies`."""

    def __init__(self) -> None:
        self._last = -1

    def pick(self, loads: Loads, prompt: int, number: int) -> int:
        after = loads.after(prompt)
        last = loads.place.get(self._last)
        behind = np.searchsorted(loads.rows, self._last, "right") if last is None else last + 1
        start = int(behind) % len(after)  # of equals, the next one behind the last choice
        at = start + int(after[start:].argmin())
        if start:
            head = int(after[:start].argmin())
            at = head if after[head] < after[at] else at
        self._last = int(loads.rows[at])
        return self._last


class RoundRobin:
    """The same, for replicas of equal weight; others by credit."""

    def __init__(self) -> None:
        self._last = -1
        self._credit: dict[int, float] = {}

    def pick(self, loads: Loads, prompt: int, number: int) -> int:
        rows, weight = loads.rows, loads.weight
        if weight is None:
            at = int(np.searchsorted(rows, self._last, side="right"))
            self._last = int(rows[at] if at < len(rows) else rows[0])
            return self._last
        credit = np.array([self._credit.get(row, 0.0) for row in rows.tolist()]) + weight
        chosen = int(credit.argmax())
        credit[chosen] -= weight.sum()
        self._credit = dict(zip(rows.tolist(), credit.tolist(), strict=True))
        self._last = int(rows[chosen])
        return self._last


class Random:
    """The same, with the same draws for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def pick(self, loads: Loads, prompt: int, number: int) -> int:
        rows = loads.rows
        if loads.weight is None:
            return int(rows[self._random.choice(range(len(rows)))])
        total = np.cumsum(loads.weight)
        at = np.searchsorted(total, self._random.random() * (total[-1] + 0.0), side="right")
        return int(rows[min(int(at), len(rows) - 1)])


class PowerOfTwo:
    """The same, with the same draws for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def pick(self, loads: Loads, prompt: int, number: int) -> int:
        rows = loads.rows
        if len(rows) == 1:
            return int(rows[0])
        first, second = self._random.sample(range(len(rows)), 2)
        after = loads.after(prompt)
        return int(rows[first if after[first] <= after[second] else second])


class ConsistentHash:
    """The same ring; the key of a request is its number, since there is no text."""

    _POINTS = 64

    def __init__(self, names: Callable[[int], Target]) -> None:
        self._names = names
        self._rows: bytes = b""
        self._points = np.zeros(0, dtype=np.uint64)
        self._owners = np.zeros(0, dtype=np.int64)

    def pick(self, loads: Loads, prompt: int, number: int) -> int:
        if loads.rows.tobytes() != self._rows:
            self._make_ring(loads.rows)
        at = int(np.searchsorted(self._points, np.uint64(_hash(str(number).encode()))))
        return int(self._owners[at % len(self._owners)])

    def _make_ring(self, rows: np.ndarray) -> None:
        self._rows = rows.tobytes()
        ring = sorted(
            (_hash(f"{self._names(row)} {point}".encode()), row)
            for row in rows.tolist()
            for point in range(self._POINTS)
        )
        self._points = np.array([point for point, _ in ring], dtype=np.uint64)
        self._owners = np.array([row for _, row in ring])


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


def make_pick(policy: str, seed: int, names: Callable[[int], Target]) -> Pick:
    """The policy of that name."""
    if policy == "round_robin":
        return RoundRobin().pick
    if policy == "random":
        return Random(seed).pick
    if policy == "power_of_two":
        return PowerOfTwo(seed).pick
    if policy == "consistent_hash":
        return ConsistentHash(names).pick
    return LeastLoaded().pick
