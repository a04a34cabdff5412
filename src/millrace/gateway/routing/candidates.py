"""Where a request can go next: replicas that serve its model, have room, and have not failed it.

It picks, and words what a client is told where there is nobody. It sends nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from millrace.gateway.http.message import Answer, error_answer
from millrace.gateway.http.request_info import RequestInfo
from millrace.gateway.routing.policies import Policy
from millrace.gateway.routing.replicas import Replica, ReplicaSet


class Search:
    """One request's. per_replica: requests at once at one replica, 0 for any number."""

    def __init__(
        self, fleet: ReplicaSet, policy: Policy, info: RequestInfo, per_replica: int
    ) -> None:
        self._fleet = fleet
        self._policy = policy
        self._info = info
        self._per_replica = per_replica
        self._tried: list[Replica] = []
        self._last_failure = ""

    def refusal(self) -> Answer | None:
        """What the client is told at once, if no replica can be found now."""
        model, known = self._info.model, self._fleet.models()
        if model is not None and known and model not in known:
            names = ", ".join(sorted(known))
            message = f"no replica serves model {model!r}; served are: {names}"
            return error_answer(404, message, code="model_not_found")
        return None if self._fleet.available(model=model) else self._outage()

    def nobody(self) -> Answer:
        """What the client is told when no replica is left to try."""
        if not self._last_failure:
            return self._outage()
        message = f"every replica failed; the last: {self._last_failure}"
        return error_answer(502, message, retry_after=1)

    def has_room(self) -> bool:
        """Whether a replica could take the request now; also when none is left to wait for."""
        able = self._fleet.available(model=self._info.model)
        return not able or bool(self._free(able))

    def untried(self) -> list[Replica]:
        """Replicas that have not been tried yet."""
        return self._fleet.available(self._tried, self._info.model)

    def pick(self, able: Sequence[Replica]) -> Replica:
        """One of these (there is at least one), if possible one with room; it counts as tried."""
        free = self._free(able) or able
        began = time.perf_counter_ns()
        replica = self._policy.pick(free, self._info)
        self._fleet.part.event("relay_ns", time.perf_counter_ns() - began)
        self._tried.append(replica)
        return replica

    def failed(self, replica: Replica, reason: str) -> None:
        """The replica did not do; the client is told of the last one."""
        self._last_failure = f"{replica.target}: {reason}"

    def again(self, *, but_last: bool) -> None:
        """Replicas tried before may have come back; but_last: not the one tried last."""
        self._tried = self._tried[-1:] if but_last else []

    def _free(self, able: Sequence[Replica]) -> Sequence[Replica]:
        """Those with room, over all processes."""
        if not self._per_replica and not any(r.member.limit for r in able):
            return able
        self._fleet.look(able)
        return [r for r in able if not self._full(r)]

    def _full(self, replica: Replica) -> bool:
        return replica.full or 0 < self._per_replica <= replica.in_flight

    def _outage(self) -> Answer:
        message = f"no healthy replica: {self._fleet.describe_outage(self._info.model)}"
        return error_answer(503, message, retry_after=1)
