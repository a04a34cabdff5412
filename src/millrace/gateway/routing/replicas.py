"""The replicas as one gateway process sees them: which take requests, and their load.

Their health comes from the health monitor as a list of members. Their load is counted in the shared
counters and read from there over all processes. Nothing here knows how bytes are relayed or how
health is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, Protocol

import msgspec
import numpy as np

from millrace.common.http_client import Target
from millrace.gateway.common.clock import LOOP_CLOCK, Clock
from millrace.gateway.common.replica_spec import Records, Role
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
    ProcessCounters,
    SharedCounters,
)
from millrace.gateway.http.message import Request
from millrace.gateway.http.request_info import Kind, RequestInfo
from millrace.gateway.routing.suspects import Failure, FailureBurst, Outcome, Success, digest_of

State = Literal["up", "down", "draining"]

_NO_EVIDENCE = (501, 503)  # errors of the server that do not speak against a replica
_FEW = 32  # replicas times processes; above it numpy is faster
_MAX_MODELS = 64  # names of models whose replicas are kept; a client may ask for any name
_INITIAL_MEAN_OUTPUT = 128.0  # output tokens, until responses have been seen

NOT_CHECKED = "not checked yet"  # the reason of a replica that is new


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """The health monitor's view of one replica.

    id: never reused. slot: its row in the shared counters. lost: it cannot be reached, so its
    running requests will not end. failing: requests met failures since its last success.
    slow_start_from: the moment at which slow start began; None for full weight. limit:
    concurrent requests, 0 for any number. response_tag: stands in the ids of the responses that it
    stores; empty if it says none. role: in serving prompts and answers apart; empty: none. records:
    where it hands over those of its prompts; None: it does not, or does not say.
    """

    id: int
    slot: int
    target: Target
    state: State = "down"
    reason: str = NOT_CHECKED
    lost: bool = False
    failing: bool = False
    weight: float = 1.0
    limit: int = 0
    slow_start_from: float | None = None
    models: tuple[str, ...] = ()
    kind: Kind = "other"
    response_tag: str = ""
    role: Role = ""
    records: Records | None = None


class InFlight(Protocol):
    """A running request of a replica (exchange.py)."""

    def publish(self, replica: Replica) -> None:
        """Bring the replica's counters up to date."""
        ...

    def lost(self, reason: str, *, removed: bool) -> None:
        """Nothing more will come from the replica: it is gone, or was removed."""
        ...

    def move(self) -> None:
        """Another replica is to go on with it, by the record of what it has so far."""
        ...

    @property
    def output_tokens(self) -> int:
        """Of its answer, so far."""
        ...

    def rebalance(self, to: Replica) -> bool:
        """That replica is to go on with it, which has more room. Whether it does; once at most."""
        ...


class Replica:
    """One replica in one process.

    bytes, chunks, load_growth and resident_growth are plain attributes, because they change with
    every chunk; `publish` adds them to the shared counters. load, in_flight: over all processes, as
    of the last `ReplicaSet.refresh_load`. exchanges: its running requests of this process. burst:
    the latest failures that they met.
    """

    __slots__ = (
        "_bytes", "_chunks", "burst", "bytes", "chunks", "exchanges", "in_flight",
        "load", "load_growth", "member", "removed", "resident_growth",
    )  # fmt: skip

    def __init__(self, member: Member) -> None:
        self.member = member
        self.load = 0
        self.in_flight = 0
        self.removed = False
        self.burst = FailureBurst()
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
        """Whether it has as many requests as its limit allows."""
        return 0 < self.member.limit <= self.in_flight

    def publish(self, process_counters: ProcessCounters) -> None:
        """Add what was relayed since the last time to the shared counters."""
        if self.chunks != self._chunks:
            process_counters.add(self.slot, BYTES, self.bytes - self._bytes)
            process_counters.add(self.slot, CHUNKS, self.chunks - self._chunks)
            self._bytes, self._chunks = self.bytes, self.chunks
            process_counters.add(self.slot, LOAD, self.load_growth)
            process_counters.add(self.slot, RESIDENT, self.resident_growth)
            self.load_growth = self.resident_growth = 0


class ReplicaSet:
    """All replicas, in the order of their slots, and this process's counters.

    slow_start: seconds in which a new replica's weight grows from a tenth to its full value.
    report: called with each failure that a request meets, and with the first success after it.
    """

    def __init__(
        self,
        counters: SharedCounters,
        process_counters: ProcessCounters,
        report: Callable[[int, Outcome], None],
        slow_start: float = 10.0,
        clock: Clock = LOOP_CLOCK,
    ) -> None:
        self._clock = clock
        self.all: list[Replica] = []
        self.process_counters = process_counters
        self.on_lost: Callable[[Replica], None] = lambda replica: None
        self.on_removed: Callable[[Replica], None] = lambda replica: None
        self.on_draining: Callable[[Replica], None] = lambda replica: None
        self.counters = counters
        self._report = report
        self._slow_start = slow_start
        self._slot_count = 0
        self.has_roles = False  # whether any computes prompts for others, or answers them
        self._equal_weights = True
        self._ramps_end = 0.0  # from then on no replica has a reduced weight
        self._available: dict[str | None, list[Replica]] = {}  # by model, until the next `apply`
        self._slots: tuple[Sequence[Replica], np.ndarray] = ([], np.array([], dtype=int))
        self._mean_output = _INITIAL_MEAN_OUTPUT

    # --- membership ------------------------------------------------------------------------------

    def apply(self, members: Iterable[Member]) -> None:
        """Apply the health monitor's list."""
        known = {replica.member.id: replica for replica in self.all}
        gone = dict(known)
        made: list[Replica] = []
        draining: list[Replica] = []
        for member in members:
            replica = known.get(member.id)
            gone.pop(member.id, None)
            if replica is None:
                replica = Replica(member)
            newly_lost = member.lost and not replica.member.lost
            if member.state == "draining" != replica.member.state:
                draining.append(replica)
            replica.member = member
            made.append(replica)
            if newly_lost:
                self.on_lost(replica)
        self.all = sorted(made, key=lambda replica: replica.slot)
        self._slot_count = max((r.slot for r in made), default=-1) + 1
        self.has_roles = any(r.member.role for r in made)
        self._equal_weights = len({r.member.weight for r in made}) <= 1
        begins = [r.member.slow_start_from for r in made if r.member.slow_start_from is not None]
        self._ramps_end = max(begins) + self._slow_start if begins else 0.0
        self._available = {}
        for replica in gone.values():
            replica.removed = True
            self.on_removed(replica)
        for replica in draining:
            self.on_draining(replica)

    def models(self) -> set[str]:
        """Names of the models that replicas offer, whatever their health."""
        return {name for replica in self.all for name in replica.member.models}

    def models_differ(self) -> bool:
        """Whether replicas offer different models, so that a request must name one."""
        offers = {frozenset(replica.member.models) for replica in self.all}
        return len(offers - {frozenset()}) > 1

    def available(self, tried: Collection[Replica] = (), model: str | None = None) -> list[Replica]:
        """Replicas that take requests for this model, without those already tried. One that does
        not say what it serves is taken to serve everything. The list is the set's own: it is the
        same one until the members change."""
        found = self._available.get(model)
        if found is None:
            found = [
                r
                for r in self.all
                if r.member.state == "up"
                and (model is None or not r.member.models or model in r.member.models)
            ]
            if len(self._available) < _MAX_MODELS:
                self._available[model] = found
        return [r for r in found if r not in tried] if tried else found

    def describe_outage(self, model: str | None = None) -> str:
        """Why no replica is available, for an error message."""
        asked = [r for r in self.all if model is None or model in (*r.member.models, model)]
        if not asked:
            return "no replica is configured"
        return "; ".join(f"{r.target}: {self._why_not(r)}" for r in asked if r.member.state != "up")

    def _why_not(self, replica: Replica) -> str:
        member = replica.member
        return member.reason or member.state

    # --- load ------------------------------------------------------------------------------------

    def refresh_load(self, replicas: Sequence[Replica]) -> None:
        """Update load and in_flight of these replicas, over all processes."""
        if len(replicas) * self.counters.processes <= _FEW:
            for replica in replicas:
                replica.load, replica.in_flight = self.counters.load_and_in_flight(replica.slot)
            return
        rows = self.counters.replica_sums(self._slot_count)
        for replica in replicas:
            row = rows[replica.slot]
            replica.load, replica.in_flight = row[LOAD], row[IN_FLIGHT]

    def loads(self, replicas: Sequence[Replica]) -> np.ndarray:
        """The load of each over all processes, now. For many replicas this is much quicker than
        `refresh_load`, and their attributes stay as they are."""
        if self._slots[0] is not replicas:
            slots = np.fromiter((r.member.slot for r in replicas), dtype=int, count=len(replicas))
            self._slots = replicas, slots
        found: np.ndarray = self.counters.loads(self._slot_count)[self._slots[1]]
        return found

    @property
    def weights_are_equal(self) -> bool:
        """Whether all replicas have the same weight now, in slow start or not."""
        return self._equal_weights and (
            self._slow_start <= 0 or self._clock.now() >= self._ramps_end
        )

    def effective_weight(self, replica: Replica) -> float:
        """Its weight now, reduced during slow start."""
        member = replica.member
        if member.slow_start_from is None or self._slow_start <= 0:
            return member.weight
        age = self._clock.now() - member.slow_start_from
        return member.weight * min(1.0, max(0.1, age / self._slow_start))

    def expected_output_tokens(self, info: RequestInfo) -> int:
        """Output tokens to expect, from the mean of earlier responses."""
        mean = int(self._mean_output)
        return min(mean, info.max_tokens) if info.max_tokens else mean

    def record_output(self, chunks: int) -> None:
        """A stream has ended after so many chunks."""
        self._mean_output += 0.05 * (chunks - self._mean_output)

    def request_started(self, replica: Replica, size: int, prompt: int) -> None:
        """It has one more request of `size` tokens, `prompt` of them in the prompt."""
        process_counters, slot = self.process_counters, replica.slot
        process_counters.add(slot, LOAD, size)
        process_counters.add(slot, RESIDENT, prompt)
        process_counters.add(slot, IN_FLIGHT, 1)
        process_counters.add(slot, PICKS, 1)
        process_counters.add(slot, PROMPT_TOKENS, prompt)

    def request_ended(self, replica: Replica, load: int, resident: int) -> None:
        """It has one request less. load, resident: the tokens that were counted for it."""
        if replica.removed:
            return  # its slot may belong to another replica by now
        self.process_counters.add(replica.slot, LOAD, -load)
        self.process_counters.add(replica.slot, RESIDENT, -resident)
        self.process_counters.add(replica.slot, IN_FLIGHT, -1)
        replica.publish(self.process_counters)

    # --- outcomes of requests --------------------------------------------------------------------

    def report_failure(self, replica: Replica, failure: Failure) -> None:
        """A request met a failure at a replica; the health monitor decides what follows."""
        if not failure.lost:
            self.process_counters.add(replica.slot, FAILURES, 1)
        replica.burst = replica.burst.after(self._clock.now(), failure)
        self._report(replica.member.id, failure)

    def record_answer(self, replica: Replica, status: int, request: Request, suspect: bool) -> None:
        """A request was answered in full. An error of the server counts as a failure, except 501,
        which is about the request, and 503, which is about load. suspect: replicas had failed on
        the request before."""
        if status >= 500:
            if status not in _NO_EVIDENCE:
                failure = Failure(f"answered {status}", digest_of(request), reached=False)
                self.report_failure(replica, failure)
            return
        self.process_counters.add(replica.slot, ENDED, 1)
        if suspect or replica.member.failing:
            self._report(replica.member.id, Success(digest_of(request) if suspect else b""))
