"""Streams that leave a crowded replica for one with room, before anybody has to wait there.

From time to time the replicas that answer prompts are compared by their requests, over all gateway
processes. Where two of them differ by much, twice in a row, some streams of the fuller one go on at
the emptier one: the youngest, as many as a quarter of the difference, so that the two cannot change
places. A stream goes once. How a stream moves is the exchange's business.
"""

from __future__ import annotations

from collections.abc import Sequence

from millrace.gateway.routing.replicas import Replica, ReplicaSet

MOST_AT_ONCE = 8  # streams of one look
_SHARE = 4  # of the difference that goes: one part in so many


class Rebalancer:
    """Of one gateway process. gap: requests by which two replicas must differ; 0: nothing moves."""

    def __init__(self, replicas: ReplicaSet, gap: int) -> None:
        self._replicas, self._gap = replicas, gap
        self._crowded: Replica | None = None  # at the last look

    def look(self) -> int:
        """Move streams if replicas differ by too much. Returns how many go."""
        if not self._gap or not self._replicas.has_roles:
            return 0
        able = [one for one in self._replicas.available() if _answers(one)]
        if len(able) < 2:
            return 0
        self._replicas.refresh_load(able)
        fullest = max(able, key=lambda one: one.in_flight)
        emptiest = min(able, key=lambda one: one.in_flight)
        difference = fullest.in_flight - emptiest.in_flight
        before, self._crowded = self._crowded, fullest if difference >= self._gap else None
        if self._crowded is None or self._crowded is not before:
            return 0
        self._crowded = None  # what is moved now shows at the look after the next
        return self._move(fullest, emptiest, able, difference // _SHARE)

    def _move(self, fullest: Replica, emptiest: Replica, able: Sequence[Replica], most: int) -> int:
        # Other processes move their own streams: each its part of the difference.
        own = len(fullest.exchanges) / max(1, fullest.in_flight)
        count = min(MOST_AT_ONCE, round(most * own))
        moved = 0
        for exchange in sorted(fullest.exchanges, key=lambda one: one.output_tokens):
            if moved == count:
                break
            moved += exchange.rebalance(emptiest)
        return moved


def _answers(replica: Replica) -> bool:
    """Whether it goes on with other replicas' streams, and gives its own away, by their records."""
    member = replica.member
    return member.kind == "millrace" and member.role in ("decode", "both")
