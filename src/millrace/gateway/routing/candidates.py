"""Replicas that a request can go to next: they serve its model and have not failed it yet.

It picks one, and makes the reply for the case that there is none. It sends nothing.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from millrace.gateway.http.message import LocalReply, error_reply
from millrace.gateway.http.request_info import RequestInfo
from millrace.gateway.routing.policies import Policy
from millrace.gateway.routing.replicas import Replica, ReplicaSet


def model_not_found(problem: str, known: Collection[str]) -> LocalReply:
    """404 that names the models."""
    names = ", ".join(sorted(known)) or "none"
    return error_reply(404, f"{problem}; served are: {names}", code="model_not_found")


class Candidates:
    """The candidates of one request. max_requests_per_replica: 0 for any number."""

    def __init__(
        self,
        replica_set: ReplicaSet,
        policy: Policy,
        info: RequestInfo,
        max_requests_per_replica: int,
    ) -> None:
        self._replica_set = replica_set
        self._policy = policy
        self._info = info
        self._per_replica = max_requests_per_replica
        self._tried: list[Replica] = []
        self._last_failure = ""

    def refusal(self) -> LocalReply | None:
        """The reply if no replica can take the request at all; else None."""
        model, known = self._info.model, self._replica_set.models()
        if model is not None and known and model not in known:
            return model_not_found(f"no replica serves model {model!r}", known)
        unnamed = model is None and bool(self._info.request.body) and not self._holders()
        if unnamed and self._replica_set.models_differ():
            return model_not_found("the request names no model", known)
        return None if self._available() else self._outage_reply()

    def exhausted_reply(self) -> LocalReply:
        """The reply when no replica is left to try."""
        if not self._last_failure:
            return self._outage_reply()
        message = f"every replica failed; the last: {self._last_failure}"
        return error_reply(502, message, retry_after=1)

    def has_capacity(self) -> bool:
        """Whether a replica could take the request now; true as well if no replica is left."""
        available = self._available()
        return not available or bool(self._free(available))

    def is_outage(self) -> bool:
        """Whether no replica that could take the request is up."""
        return not self._available()

    def has_room(self, most: int) -> bool:
        """Whether an available replica has fewer than `most` requests."""
        available = self._available()
        self._replica_set.refresh_load(available)
        return any(r.in_flight < most and not self._full(r) for r in available)

    def untried(self) -> list[Replica]:
        """Replicas that have not been tried yet."""
        return self._available(self._tried)

    def _holders(self) -> list[Replica]:
        """Replicas that keep the stored response which the request names."""
        tag = self._info.response_tag
        if not tag:
            return []
        return [r for r in self._replica_set.all if r.member.response_tag == tag]

    def _available(self, tried: Sequence[Replica] = ()) -> list[Replica]:
        """Replicas that can take the request. One that names a stored response goes to the replica
        that keeps it; where none is known to, any of them says so."""
        available = self._replica_set.available(tried, self._info.model)
        holders = self._holders()
        return [r for r in available if r in holders] if holders else available

    def pick(self, available: Sequence[Replica]) -> Replica:
        """One of these (at least one), with capacity if possible; it counts as tried."""
        free = self._free(available) or available
        began = time.perf_counter_ns()
        replica = self._policy.pick(free, self._info)
        self._replica_set.process_counters.count_event("relay_ns", time.perf_counter_ns() - began)
        self._tried.append(replica)
        return replica

    def record_failure(self, replica: Replica, reason: str) -> None:
        """The replica failed; the reply names the last failure."""
        self._last_failure = f"{replica.target}: {reason}"

    def reset(self, *, keep_last: bool) -> None:
        """Forget which replicas were tried, because they may have come back; keep_last: except the
        last one."""
        self._tried = self._tried[-1:] if keep_last else []

    def _free(self, available: Sequence[Replica]) -> Sequence[Replica]:
        """Those with capacity, over all processes."""
        if not self._per_replica and not any(r.member.limit for r in available):
            return available
        self._replica_set.refresh_load(available)
        return [r for r in available if not self._full(r)]

    def _full(self, replica: Replica) -> bool:
        return replica.full or 0 < self._per_replica <= replica.in_flight

    def _outage_reply(self) -> LocalReply:
        for holder in self._holders():
            reason = holder.member.reason or holder.member.state
            message = f"the replica that keeps this stored response takes no requests: {reason}"
            return error_reply(503, message, retry_after=1)
        message = f"no healthy replica: {self._replica_set.describe_outage(self._info.model)}"
        return error_reply(503, message, retry_after=1)
