"""Which replica takes a request: the policies, each a small class with one method.

A picker is asked once a request (again after a failure, without the replica that failed), before
anything is sent. It sees the replicas' load and the request, and no response. Load is in tokens,
over all gateway processes.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Protocol

from millrace.common.prefix_hash import BLOCK, hash_chain
from millrace.errors import UserError
from millrace.gateway.http.request_info import BYTES_PER_TOKEN, RequestInfo
from millrace.gateway.routing.prefix_index import PrefixTable
from millrace.gateway.routing.replicas import Replica, ReplicaSet

_RING_POINTS = 64  # of a replica of weight 1


class Policy(Protocol):
    """Chooses among replicas that can take the request; there is at least one."""

    def pick(self, replicas: Sequence[Replica], info: RequestInfo) -> Replica:
        """The replica for this request; `replicas` are in the order of their slots."""
        ...


class RoundRobin:
    """Each in turn, in proportion to its weight, spread as evenly as can be."""

    def __init__(self, fleet: ReplicaSet) -> None:
        self._fleet = fleet
        self._last = -1
        self._credit: dict[int, float] = {}

    def pick(self, replicas: Sequence[Replica], info: RequestInfo) -> Replica:
        shares = [self._fleet.share(r) for r in replicas]
        if min(shares) == max(shares):
            chosen = next((r for r in replicas if r.slot > self._last), replicas[0])
        else:
            chosen = self._by_credit(replicas, shares)
        self._last = chosen.slot
        return chosen

    def _by_credit(self, replicas: Sequence[Replica], shares: Sequence[float]) -> Replica:
        """Everybody earns its share a round; the richest is picked and pays for all (as nginx)."""
        buffer = {r.member.id: self._credit.get(r.member.id, 0.0) for r in replicas}
        for replica, share in zip(replicas, shares, strict=True):
            buffer[replica.member.id] += share
        chosen = max(replicas, key=lambda r: buffer[r.member.id])
        buffer[chosen.member.id] -= sum(shares)
        self._credit = buffer
        return chosen


class Random:
    """One drawn at random, in proportion to its weight."""

    def __init__(self, fleet: ReplicaSet, seed: int | None = None) -> None:
        self._fleet = fleet
        self._random = random.Random(seed)

    def pick(self, replicas: Sequence[Replica], info: RequestInfo) -> Replica:
        weights = [self._fleet.share(r) for r in replicas]
        return self._random.choices(replicas, weights)[0]


class LeastLoaded:
    """The one that would carry the fewest tokens for its weight; among equals, each in turn."""

    def __init__(self, fleet: ReplicaSet) -> None:
        self._fleet = fleet
        self._last = -1

    def pick(self, replicas: Sequence[Replica], info: RequestInfo) -> Replica:
        self._fleet.look(replicas)
        after = [self.pressure(r, info) for r in replicas]
        least = min(after)
        equals = [r for r, value in zip(replicas, after, strict=True) if value == least]
        chosen = next((r for r in equals if r.slot > self._last), equals[0])
        self._last = chosen.slot
        return chosen

    def pressure(self, replica: Replica, info: RequestInfo) -> float:
        """Its load with this request, for its weight; `look` must have been called."""
        return (replica.load + info.prompt_tokens) / self._fleet.share(replica)


class PowerOfTwo:
    """The less loaded of two drawn at random (Mitzenmacher, 2001): spreads load nearly as well as
    looking at all."""

    def __init__(self, fleet: ReplicaSet, seed: int | None = None) -> None:
        self._least = LeastLoaded(fleet)
        self._fleet = fleet
        self._random = random.Random(seed)

    def pick(self, replicas: Sequence[Replica], info: RequestInfo) -> Replica:
        if len(replicas) == 1:
            return replicas[0]
        two = self._random.sample(replicas, 2)
        self._fleet.look(two)
        return min(two, key=lambda r: self._least.pressure(r, info))


class PrefixAware:
    """The replica that has seen the longest beginning of the prompt, while it carries at most
    `gap` tokens more than the least loaded; else that one. Prompts nobody knows go there too."""

    def __init__(self, fleet: ReplicaSet, table: PrefixTable, gap: int = 4096) -> None:
        self._fleet = fleet
        self._table = table
        self._gap = gap
        self._least = LeastLoaded(fleet)

    def pick(self, replicas: Sequence[Replica], info: RequestInfo) -> Replica:
        least = self._least.pick(replicas, info)
        if not info.prompt:
            return least
        chain = hash_chain(info.prompt)
        chosen = self._knowing(replicas, chain, info, least)
        self._table.learn(chosen.slot, chain)
        return chosen

    def _knowing(
        self, replicas: Sequence[Replica], chain: list[int], info: RequestInfo, least: Replica
    ) -> Replica:
        blocks, slots = self._table.longest([r.slot for r in replicas], chain)
        if not blocks:
            return least
        having = [r for r in replicas if r.slot in slots]
        best = min(having, key=lambda r: self._least.pressure(r, info))
        gap = self._least.pressure(best, info) - self._least.pressure(least, info)
        saved = blocks * BLOCK / BYTES_PER_TOKEN
        return best if gap <= self._gap + saved else least


class ConsistentHash:
    """The replica that a key falls to: the session, the user, or how the prompt begins. When
    replicas come and go only their own keys move (Karger, 1997)."""

    def __init__(self, fleet: ReplicaSet) -> None:
        self._fleet = fleet
        self._made_for: tuple[object, ...] = ()
        self._points: list[int] = []
        self._owners: list[int] = []

    def pick(self, replicas: Sequence[Replica], info: RequestInfo) -> Replica:
        self._make_ring()
        able = {r.member.id: r for r in replicas}
        start = bisect_left(self._points, _hash(info.key))
        for step in range(len(self._points)):
            owner = self._owners[(start + step) % len(self._points)]
            if owner in able:
                return able[owner]
        return replicas[0]

    def _make_ring(self) -> None:
        members = tuple((r.member.id, r.target, r.member.weight) for r in self._fleet.all)
        if members == self._made_for:
            return
        ring = sorted(
            (_hash(f"{target} {point}".encode()), id)
            for id, target, weight in members
            for point in range(max(1, round(weight * _RING_POINTS)))
        )
        self._points = [point for point, _ in ring]
        self._owners = [owner for _, owner in ring]
        self._made_for = members


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


Make = Callable[[ReplicaSet, PrefixTable, int], Policy]

POLICIES: Mapping[str, Make] = {
    "least_loaded": lambda fleet, table, gap: LeastLoaded(fleet),
    "round_robin": lambda fleet, table, gap: RoundRobin(fleet),
    "random": lambda fleet, table, gap: Random(fleet),
    "power_of_two": lambda fleet, table, gap: PowerOfTwo(fleet),
    "prefix_aware": PrefixAware,
    "consistent_hash": lambda fleet, table, gap: ConsistentHash(fleet),
}
DEFAULT_POLICY = "least_loaded"
BY_PREFIX = frozenset({"prefix_aware"})  # those that look into the prefix table


def make_policy(policy: str, fleet: ReplicaSet, table: PrefixTable, gap: int = 4096) -> Policy:
    """The picker of that name. gap: tokens of prefix_aware. Raises UserError for an unknown one."""
    if policy not in POLICIES:
        raise UserError(f"--policy {policy!r}: use one of {', '.join(POLICIES)}")
    return POLICIES[policy](fleet, table, gap)
