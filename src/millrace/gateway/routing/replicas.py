"""The replicas as one gateway process sees them: who takes requests, and what each carries.

What is known of their health comes from the keeper (keeper.py), as a list of members; what they
carry is counted here and on the board, and read from there over all processes. Nothing here knows
how bytes are relayed or how health is found out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, Protocol

import msgspec

from millrace.common.http_client import Target
from millrace.gateway.common.shared_counters import (
    BYTES,
    CHUNKS,
    ENDED,
    FAILURES,
    IN_FLIGHT,
    LOAD,
    PICKS,
    PROMPT_TOKENS,
    RESIDENT,
    Part,
    SharedCounters,
)
from millrace.gateway.http.request_info import Kind, RequestInfo

State = Literal["up", "down", "draining"]

_FEW = 32  # replicas times processes: above, numpy sums quicker
_ERRORS_IN_ROW = 5
_FIRST_GUESS = 128.0  # output tokens, until answers have been seen


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """What the keeper says of one replica.

    id: never given twice. slot: its row on the board. lost: it is down because it cannot be
    reached, so what it has under way will not end. ramp_from: `time.monotonic()` of the moment
    from which slow start counts, None for full weight at once. limit: requests at once, 0 for any.
    """

    id: int
    slot: int
    target: Target
    state: State = "down"
    reason: str = "not checked yet"
    lost: bool = False
    failing: bool = False
    weight: float = 1.0
    limit: int = 0
    ramp_from: float | None = None
    models: tuple[str, ...] = ()
    kind: Kind = "other"


class InFlight(Protocol):
    """A request that a replica carries (exchange.py)."""

    def publish(self, replica: Replica) -> None:
        """Bring the replica's counters up to date."""
        ...

    def failed(self, reason: str, *, lost: bool = False) -> None:
        """Nothing more will come from the replica. lost: the keeper found it out."""
        ...


class Replica:
    """One replica in one process. Hot counters are plain attributes; `publish` copies them: bytes
    and chunks relayed, and by what its load and what it holds (tokens) grew since the last time.

    load and in_flight are over all processes, as of the last `ReplicaSet.look`. exchanges: those
    of this process that it carries.
    """

    __slots__ = (
        "_bytes", "_chunks", "bytes", "chunks", "errors_in_row", "exchanges", "in_flight", "load",
        "load_growth", "member", "removed", "resident_growth",
    )  # fmt: skip

    def __init__(self, member: Member) -> None:
        self.member = member
        self.load = 0
        self.in_flight = 0
        self.removed = False
        self.errors_in_row = 0
        self.bytes = self.chunks = 0
        self._bytes = self._chunks = 0
        self.load_growth = self.resident_growth = 0
        self.exchanges: set[InFlight] = set()

    @property
    def slot(self) -> int:
        return self.member.slot

    @property
    def target(self) -> Target:
        return self.member.target

    @property
    def full(self) -> bool:
        """Whether it carries as many requests as it may."""
        return 0 < self.member.limit <= self.in_flight

    def publish(self, part: Part) -> None:
        """Copy what was relayed since the last time to the board."""
        if self.chunks != self._chunks:
            part.add(self.slot, BYTES, self.bytes - self._bytes)
            part.add(self.slot, CHUNKS, self.chunks - self._chunks)
            self._bytes, self._chunks = self.bytes, self.chunks
            part.add(self.slot, LOAD, self.load_growth)
            part.add(self.slot, RESIDENT, self.resident_growth)
            self.load_growth = self.resident_growth = 0


class ReplicaSet:
    """All replicas, in the order of their slots, and this process's part of the board.

    slow_start: seconds in which a new replica's weight grows from a tenth to the whole.
    report: told of each failure that a request meets, and of the first success after it.
    """

    def __init__(
        self,
        counters: SharedCounters,
        part: Part,
        report: Callable[[int, str | None], None],
        slow_start: float = 10.0,
    ) -> None:
        self.all: list[Replica] = []
        self.part = part
        self.on_lost: Callable[[Replica], None] = lambda replica: None
        self.on_removed: Callable[[Replica], None] = lambda replica: None
        self._counters = counters
        self._report = report
        self._slow_start = slow_start
        self._rows = 0
        self._ramping = False
        self._mean_output = _FIRST_GUESS
        self._out: dict[int, str] = {}  # failed here, and the keeper has not said so yet

    # --- membership ------------------------------------------------------------------------------

    def apply(self, members: Iterable[Member]) -> None:
        """Take over what the keeper says."""
        known = {replica.member.id: replica for replica in self.all}
        gone = dict(known)
        made = []
        for member in members:
            replica = known.get(member.id)
            gone.pop(member.id, None)
            if replica is None:
                replica = Replica(member)
            newly_lost = member.lost and not replica.member.lost
            replica.member = member
            made.append(replica)
            if member.failing or member.state != "up":
                self._out.pop(member.id, None)
            if newly_lost:
                self.on_lost(replica)
        self.all = sorted(made, key=lambda replica: replica.slot)
        self._rows = max((r.slot for r in made), default=-1) + 1
        self._ramping = any(r.member.ramp_from is not None for r in made)
        for replica in gone.values():
            self._out.pop(replica.member.id, None)
            replica.removed = True
            self.on_removed(replica)

    def models(self) -> set[str]:
        """Names of the models that replicas offer, whatever their health."""
        return {name for replica in self.all for name in replica.member.models}

    def takes(self, replica: Replica) -> bool:
        """Whether it may be given requests."""
        return replica.member.state == "up" and replica.member.id not in self._out

    def available(self, tried: Collection[Replica] = (), model: str | None = None) -> list[Replica]:
        """Replicas that take requests for this model, without those already tried. One that does
        not say what it serves is taken to serve everything."""
        return [
            r
            for r in self.all
            if self.takes(r)
            and r not in tried
            and (model is None or not r.member.models or model in r.member.models)
        ]

    def describe_outage(self, model: str | None = None) -> str:
        """Why no replica is available, for an error message."""
        asked = [r for r in self.all if model is None or model in (*r.member.models, model)]
        if not asked:
            return "no replica is configured"
        return "; ".join(
            f"{r.target}: {self._out.get(r.member.id) or r.member.reason or r.member.state}"
            for r in asked
            if not self.takes(r)
        )

    # --- load ------------------------------------------------------------------------------------

    def look(self, replicas: Sequence[Replica]) -> None:
        """Bring load and in_flight of these up to date, over all processes."""
        if len(replicas) * self._counters.processes <= _FEW:
            for replica in replicas:
                replica.load, replica.in_flight = self._counters.account(replica.slot)
            return
        rows = self._counters.replica_sums(self._rows)
        for replica in replicas:
            row = rows[replica.slot]
            replica.load, replica.in_flight = row[LOAD], row[IN_FLIGHT]

    def share(self, replica: Replica) -> float:
        """Its weight now: what it was given, less while it starts slowly."""
        member = replica.member
        if not self._ramping or member.ramp_from is None or self._slow_start <= 0:
            return member.weight
        age = time.monotonic() - member.ramp_from
        return member.weight * min(1.0, max(0.1, age / self._slow_start))

    def expected_output(self, info: RequestInfo) -> int:
        """Output tokens to reckon with, from what answers had so far."""
        mean = int(self._mean_output)
        return min(mean, info.max_tokens) if info.max_tokens else mean

    def learn_output(self, chunks: int) -> None:
        """A stream has ended after so many chunks."""
        self._mean_output += 0.05 * (chunks - self._mean_output)

    def picked(self, replica: Replica, size: int, prompt: int) -> None:
        """It carries one more request of `size` tokens, `prompt` of them known already."""
        part, slot = self.part, replica.slot
        part.add(slot, LOAD, size)
        part.add(slot, RESIDENT, prompt)
        part.add(slot, IN_FLIGHT, 1)
        part.add(slot, PICKS, 1)
        part.add(slot, PROMPT_TOKENS, prompt)

    def released(self, replica: Replica, load: int, resident: int) -> None:
        """It carries one request less; load and resident: what that one had been counted as."""
        if replica.removed:
            return  # its row may be another's by now
        self.part.add(replica.slot, LOAD, -load)
        self.part.add(replica.slot, RESIDENT, -resident)
        self.part.add(replica.slot, IN_FLIGHT, -1)
        replica.publish(self.part)

    # --- what requests meet ----------------------------------------------------------------------

    def failed(self, replica: Replica, reason: str) -> None:
        """A request met a failure: out at once here, and the keeper decides for how long."""
        self.part.add(replica.slot, FAILURES, 1)
        self._out[replica.member.id] = reason
        self._report(replica.member.id, reason)

    def answered(self, replica: Replica, status: int) -> None:
        """A request was answered in full. One error of the server's is that request's; several in a
        row are the replica's, which would otherwise draw all requests by being so quick."""
        if status >= 500:
            replica.errors_in_row += 1
            if replica.errors_in_row >= _ERRORS_IN_ROW:
                replica.errors_in_row = 0
                self.failed(replica, f"answered {status}, an error {_ERRORS_IN_ROW} times in a row")
            return
        replica.errors_in_row = 0
        self.part.add(replica.slot, ENDED, 1)
        if replica.member.failing:
            self._report(replica.member.id, None)
