"""The live page of a gateway: what its replicas did in each second, one by one and together.

Replicas keep samples of their own seconds; the health monitor reads them with the load reports, so
no request is added. The page of a replica that has died still has its past. What is not known of a
replica, since it is another server, is left out; its requests are counted here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import msgspec

from millrace.dashboard.history import HOUR, History, json_list
from millrace.dashboard.sample import Sample, of_replicas, of_seconds
from millrace.dashboard.stream import Cursor, Feed, ReplicaRow
from millrace.gateway.common.shared_counters import IN_FLIGHT, SharedCounters
from millrace.gateway.health.events import FleetEvents
from millrace.gateway.routing.replicas import Member

EVERY = 5  # seconds of one sample in a replica's own history, so that 256 of them take 40 MB
STALE = 5  # seconds after which a replica's newest sample says nothing of now
_encode = msgspec.json.Encoder().encode


class _Replica:
    """What is known of one replica. fresh: samples since the last second that was added up."""

    def __init__(self) -> None:
        self.fresh: list[Sample] = []
        self.history = History(HOUR, EVERY)
        self.latest: msgspec.Raw | None = None
        self.seen = 0
        self._figures = b""

    def second(self, at: int, running: int, tells: bool) -> Sample | None:
        """Its sample for the second that ends now; None if it is late. running: as the gateway
        counts them. tells: it keeps samples itself."""
        self.seen = self.seen or at
        if self.fresh:
            sample = of_seconds(self.fresh)
            self.fresh, self.seen = [], at
        elif tells and at - self.seen < STALE:
            return None  # late; it will bring this second too
        else:
            sample = Sample(at=at, running=running)
        self.history.add(sample)
        self._show(sample)
        return sample

    def _show(self, sample: Sample) -> None:
        """Make a sample the latest one, unless it says the same of another second: viewers get a
        replica's row when it has changed."""
        said = _encode(sample)
        figures = said[said.index(b",") :]  # behind its time
        if self.latest is None or figures != self._figures:
            self.latest, self._figures = msgspec.Raw(said), figures


class FleetPage:
    """members: gives the replicas; name: what people call one. version: of this program."""

    def __init__(
        self,
        counters: SharedCounters,
        members: Callable[[], Sequence[Member]],
        name: Callable[[Member], str],
        events: FleetEvents,
        about: dict[str, Any],
    ) -> None:
        self._counters, self._members, self._name = counters, members, name
        self._events = events
        self._replicas: dict[int, _Replica] = {}
        self._history = History()
        self._last: dict[int, Sample] = {}  # of replicas whose newest sample is late
        self._feed = Feed(uuid4().hex[:12], about, self._history)

    def add(self, id: int, samples: Sequence[Sample]) -> None:
        """Take what a replica says of its last seconds."""
        replica = self._replicas.setdefault(id, _Replica())
        replica.fresh += samples

    def tick(self) -> None:
        """Add up the second that ends now."""
        at, members = int(time.time()), self._members()
        for id in self._replicas.keys() - {member.id for member in members}:
            del self._replicas[id]
            self._last.pop(id, None)
        rows = self._counters.replica_sums(max((m.slot for m in members), default=-1) + 1)
        seconds = []
        for member in members:
            replica = self._replicas.setdefault(member.id, _Replica())
            if member.state == "down":
                replica.fresh, replica.latest = [], None
                self._last.pop(member.id, None)
                continue
            running = rows[member.slot][IN_FLIGHT]
            sample = replica.second(at, running, tells=member.kind != "other")
            if sample is None:
                sample = _levels(self._last.get(member.id))
            else:
                self._last[member.id] = sample
            seconds.append(sample)
        whole = of_replicas(at, seconds)
        gauge = self._counters.gauge
        whole.waiting += gauge("queued_interactive") + gauge("queued_batch") + gauge("held")
        self._history.add(whole)

    def message(self, cursor: Cursor) -> tuple[bytes, Cursor]:
        """The next server-sent event of a viewer that has seen so much."""
        rows = [
            ReplicaRow(member.id, self._name(member), member.state, member.reason, self._at(member))
            for member in self._members()
        ]
        return self._feed.message(cursor, self._events.since(0), rows)

    def _at(self, member: Member) -> msgspec.Raw | None:
        replica = self._replicas.get(member.id)
        return None if replica is None else replica.latest

    def replica_history(self, id: int) -> msgspec.Raw | None:
        """The last hour of a replica as a JSON list; None for one that is not known."""
        replica = self._replicas.get(id)
        return None if replica is None else json_list(replica.history.since(0))


def _levels(sample: Sample | None) -> Sample:
    """The levels of a sample whose counts were added already."""
    if sample is None:
        return Sample(at=0)
    return Sample(
        at=sample.at, running=sample.running, waiting=sample.waiting, pages=sample.pages,
        states=sample.states, power=sample.power, clock=sample.clock,
    )  # fmt: skip
