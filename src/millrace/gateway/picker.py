"""Which replica takes a request: the policies, each a small class with one method.

A picker is asked once a request (again after a failure, without the replica that failed), before
anything is sent. It sees the replicas' load and the request, and no response.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from millrace.errors import UserError
from millrace.gateway.message import Request
from millrace.gateway.replicas import Replica


class Picker(Protocol):
    """Chooses among replicas that can take the request; there is at least one."""

    def pick(self, replicas: Sequence[Replica], request: Request) -> Replica:
        """The replica for this request; `replicas` are in the order of their index."""
        ...


class RoundRobin:
    """Each in turn; one that is missing passes its turn to the next in order."""

    def __init__(self) -> None:
        self._last = -1

    def pick(self, replicas: Sequence[Replica], request: Request) -> Replica:
        chosen = next((r for r in replicas if r.index > self._last), replicas[0])
        self._last = chosen.index
        return chosen


class LeastLoaded:
    """The one with the fewest requests in flight; among equals, each in turn."""

    def __init__(self) -> None:
        self._turn = RoundRobin()

    def pick(self, replicas: Sequence[Replica], request: Request) -> Replica:
        least = min(r.in_flight for r in replicas)
        return self._turn.pick([r for r in replicas if r.in_flight == least], request)


class PowerOfTwo:
    """The less loaded of two drawn at random (Mitzenmacher, 2001): spreads load nearly as well as
    looking at all, and does not herd when several gateways share the replicas."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def pick(self, replicas: Sequence[Replica], request: Request) -> Replica:
        if len(replicas) == 1:
            return replicas[0]
        first, second = self._random.sample(replicas, 2)
        return first if first.in_flight <= second.in_flight else second


POLICIES: Mapping[str, Callable[[], Picker]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "power_of_two": PowerOfTwo,
}


def make_picker(policy: str) -> Picker:
    """The picker of that name. Raises UserError for an unknown one."""
    if policy not in POLICIES:
        raise UserError(f"--policy {policy!r}: use one of {', '.join(POLICIES)}")
    return POLICIES[policy]()
