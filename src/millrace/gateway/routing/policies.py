"""The routing policies: each is a small class with one method that picks a replica.

A policy is asked once per request before anything is sent, and again after a failure, without the
replica that failed. It sees the replicas' load and the request, and no response. Load is in tokens,
over all gateway processes.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Protocol

import numpy as np

from millrace.common.prefix_hash import depth_of, hash_pieces
from millrace.errors import UserError
from millrace.gateway.http.request_info import BYTES_PER_TOKEN, RequestInfo
from millrace.gateway.routing.prefix_index import PrefixTable
from millrace.gateway.routing.replicas import Replica, ReplicaSet

# Of a known prefix by its tier: what of the time to compute it is saved. 60,000 tokens of a 27B are
# computed in 5 s; they come from the host's memory in some 0.05 s, from a disk in 1 s and more.
WORTH = {"device": 1.0, "host": 0.95, "disk": 0.6}
_FEW = 16  # replicas; above it arrays are faster
_RING_POINTS = 64  # of a replica of weight 1


class Policy(Protocol):
    """Chooses among replicas that can take the request; there is at least one."""

    def pick(self, replicas: Sequence[Replica], info: RequestInfo) -> Replica:
        """The replica for this request; `replicas` are in the order of their slots."""
        ...


class RoundRobin:
    """Each in turn, in proportion to its weight (smooth weighted round robin)."""

    def __init__(self, replica_set: ReplicaSet) -> None:
        self._replica_set = replica_set
        self._last = -1
        self._credit: dict[int, float] = {}

    def pick(self, replicas: Sequence[Replica], info: RequestInfo) -> Replica:
        if self._replica_set.weights_are_equal:
            at = bisect_right(replicas, self._last, key=lambda r: r.slot)
            chosen = replicas[at] if at < len(replicas) else replicas[0]
        else:
            chosen = self._by_credit(replicas)
        self._last = chosen.slot
        return chosen

    def _by_credit(self, replicas: Sequence[Replica]) -> Replica:
        """Each replica gains its weight per round; the one with the most credit is picked and pays
        the sum of all weights (as in nginx)."""
        weights = [self._replica_set.effective_weight(r) for r in replicas]
        credit = {r.member.id: self._credit.get(r.member.id, 0.0) for r in replicas}
        for replica, weight in zip(replicas, weights, strict=True):
            credit[replica.member.id] += weight
        chosen = max(replicas, key=lambda r: credit[r.member.id])
        credit[chosen.member.id] -= sum(weights)
        self._credit = credit
        return chosen


class Random:
    """One drawn at random, in proportion to its weight."""

    def __init__(self, replica_set: ReplicaSet, seed: int | None = None) -> None:
        self._replica_set = replica_set
        self._random = random.Random(seed)

    def pick(self, replicas: Sequence[Replica], info: RequestInfo) -> Replica:
        if self._replica_set.weights_are_equal:
            return self._random.choice(replicas)
        weights = [self._replica_set.effective_weight(r) for r in replicas]
        return self._random.choices(replicas, weights)[0]


class LeastLoaded:
    """The one that would carry the fewest tokens for its weight; among equals, each in turn."""

    def __init__(self, replica_set: ReplicaSet) -> None:
        self._replica_set = replica_set
        self._last = -1

    def pick(self, replicas: Sequence[Replica], info: RequestInfo) -> Replica:
        if len(replicas) > _FEW and self._replica_set.weights_are_equal:
            chosen = self._of_many(replicas)
        else:
            chosen = self._of_few(replicas, info)
        self._last = chosen.slot
        return chosen

    def _of_many(self, replicas: Sequence[Replica]) -> Replica:
        """The same for replicas of equal weight, by arrays."""
        loads = self._replica_set.loads(replicas)
        equals = np.flatnonzero(loads == loads.min())
        first = bisect_right(replicas, self._last, key=lambda r: r.slot)
        later = int(np.searchsorted(equals, first))
        return replicas[int(equals[later if later < len(equals) else 0])]

    def _of_few(self, replicas: Sequence[Replica], info: RequestInfo) -> Replica:
        self._replica_set.refresh_load(replicas)
        after = [self.load_after(r, info) for r in replicas]
        least = min(after)
        equals = [r for r, value in zip(replicas, after, strict=True) if value == least]
        return next((r for r in equals if r.slot > self._last), equals[0])

    def load_after(self, replica: Replica, info: RequestInfo) -> float:
        """Its load with this request, for its weight; `refresh_load` must have been called."""
        return (replica.load + info.prompt_tokens) / self._replica_set.effective_weight(replica)


class PowerOfTwo:
    """The less loaded of two drawn at random (Mitzenmacher, 2001): balances load nearly as well as
    comparing all."""

    def __init__(self, replica_set: ReplicaSet, seed: int | None = None) -> None:
        self._least = LeastLoaded(replica_set)
        self._replica_set = replica_set
        self._random = random.Random(seed)

    def pick(self, replicas: Sequence[Replica], info: RequestInfo) -> Replica:
        if len(replicas) == 1:
            return replicas[0]
        two = self._random.sample(replicas, 2)
        self._replica_set.refresh_load(two)
        return min(two, key=lambda r: self._least.load_after(r, info))


class PrefixAware:
    """The replica that knows the longest prefix of the prompt, so that conversations stay where
    they are, unless its load exceeds the lowest by more than the prefix is worth: its tokens and
    `gap` more, but at most four times as many: a few words that many prompts begin with keep nobody
    together. Then, and for prompts that no replica knows, the least loaded one."""

    def __init__(self, replica_set: ReplicaSet, table: PrefixTable, gap: int = 4096) -> None:
        self._replica_set = replica_set
        self._table = table
        self._gap = gap
        self._least = LeastLoaded(replica_set)

    def pick(self, replicas: Sequence[Replica], info: RequestInfo) -> Replica:
        least = self._least.pick(replicas, info)
        if not info.for_text:
            return least
        chain = hash_pieces(info.prompt, info.cache_salt)
        blocks, slots = self._table.longest_match([r.slot for r in replicas], chain)
        if not blocks:
            chosen = least
        else:
            chosen = self._best_match(replicas, slots, chain[blocks - 1], info, least)
            if self._table.tier(chosen.slot, chain[blocks - 1]) != "device":
                self._table.put_in_tier(chosen.slot, chain, "device")  # soon
        self._table.learn(chosen.slot, chain)
        return chosen

    def known(
        self, replicas: Sequence[Replica], info: RequestInfo
    ) -> tuple[float, Sequence[Replica]]:
        """(tokens, replicas): the longest prefix of the prompt that any of them knows, and which
        do."""
        if not info.for_text:
            return 0.0, []
        chain = hash_pieces(info.prompt, info.cache_salt)
        blocks, slots = self._table.longest_match([r.slot for r in replicas], chain)
        if not blocks:
            return 0.0, []
        having = [r for r in replicas if r.slot in slots]
        return depth_of(chain[blocks - 1]) / BYTES_PER_TOKEN, having

    def _best_match(
        self,
        replicas: Sequence[Replica],
        slots: Sequence[int],
        block: int,
        info: RequestInfo,
        least: Replica,
    ) -> Replica:
        """Of replicas that know a prefix, which ends with `block`, or the least loaded one."""
        known = depth_of(block) / BYTES_PER_TOKEN
        saved = {slot: known * WORTH[self._table.tier(slot, block)] for slot in slots}
        having = [r for r in replicas if r.slot in slots]
        self._replica_set.refresh_load([*having, least])
        best = min(having, key=lambda r: self._least.load_after(r, info) - saved[r.slot])
        gap = self._least.load_after(best, info) - self._least.load_after(least, info)
        worth = saved[best.slot]
        return best if gap <= worth + min(self._gap, 4 * worth) else least


class ConsistentHash:
    """The replica that owns a key: the session, the user, or the start of the prompt. When replicas
    come and go only their own keys move (Karger, 1997)."""

    def __init__(self, replica_set: ReplicaSet) -> None:
        self._replica_set = replica_set
        self._ring_members: tuple[object, ...] = ()
        self._points: list[int] = []
        self._owners: list[int] = []

    def pick(self, replicas: Sequence[Replica], info: RequestInfo) -> Replica:
        self._make_ring()
        available = {r.member.id: r for r in replicas}
        start = bisect_left(self._points, _hash(info.affinity_key))
        for step in range(len(self._points)):
            owner = self._owners[(start + step) % len(self._points)]
            if owner in available:
                return available[owner]
        return replicas[0]

    def _make_ring(self) -> None:
        members = tuple((r.member.id, r.target, r.member.weight) for r in self._replica_set.all)
        if members == self._ring_members:
            return
        ring = sorted(
            (_hash(f"{target} {point}".encode()), id)
            for id, target, weight in members
            for point in range(max(1, round(weight * _RING_POINTS)))
        )
        self._points = [point for point, _ in ring]
        self._owners = [owner for _, owner in ring]
        self._ring_members = members


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


PolicyFactory = Callable[[ReplicaSet, PrefixTable, int, int | None], Policy]

POLICIES: Mapping[str, PolicyFactory] = {
    "least_loaded": lambda replica_set, table, gap, seed: LeastLoaded(replica_set),
    "round_robin": lambda replica_set, table, gap, seed: RoundRobin(replica_set),
    "random": lambda replica_set, table, gap, seed: Random(replica_set, seed),
    "power_of_two": lambda replica_set, table, gap, seed: PowerOfTwo(replica_set, seed),
    "prefix_aware": lambda replica_set, table, gap, seed: PrefixAware(replica_set, table, gap),
    "consistent_hash": lambda replica_set, table, gap, seed: ConsistentHash(replica_set),
}
BY_PREFIX = frozenset({"prefix_aware"})  # policies that use the prefix table


def make_policy(
    policy: str,
    replica_set: ReplicaSet,
    table: PrefixTable,
    gap: int = 4096,
    seed: int | None = None,
) -> Policy:
    """The policy of that name. gap: tokens, for prefix_aware. seed: of policies that draw; None:
    any. Raises UserError if the name is unknown."""
    if policy not in POLICIES:
        raise UserError(f"--policy {policy!r}: use one of {', '.join(POLICIES)}")
    return POLICIES[policy](replica_set, table, gap, seed)
