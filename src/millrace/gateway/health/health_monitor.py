"""What is known of each replica: found out here, once for all gateway processes.

Health comes from three sides: GET /health every second; a completion of one token, which needs a
real step, before a replica is taken in, before it comes back, and when it has answered nothing for
a while; and the failures that requests meet. A failed replica stays out for a time that doubles
with each failure in a row. Reports of load correct what the gateway counts itself. How replicas are
asked is known in probes.py and load_report.py. The keeper says what it knows as a list of Members,
to whoever listens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from millrace.common.backoff import Backoff, BackoffPolicy
from millrace.common.http_client import Target
from millrace.errors import UserError
from millrace.gateway.common.shared_counters import (
    ENDED,
    IN_FLIGHT,
    MAX_REPLICAS,
    RESIDENT,
    SharedCounters,
)
from millrace.gateway.health.load_report import LoadReports
from millrace.gateway.health.probes import DOUBT, HealthProbe, Problem
from millrace.gateway.routing.prefix_index import ReportedPrefixes
from millrace.gateway.routing.replicas import Member


class HealthPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, all but `misses`: the checks in a row that may go unanswered before a replica
    counts as lost. idle_probe: a replica that has completed nothing for so long must prove a step;
    0 for never. load_interval: between two load reports; 0 for none."""

    interval: float = 1.0
    timeout: float = 5.0
    misses: int = 2
    backoff: float = 1.0
    backoff_limit: float = 30.0
    idle_probe: float = 30.0
    probe_timeout: float = 60.0
    slow_start: float = 10.0
    load_interval: float = 0.2


class ReplicaSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A replica as somebody named it. source: who did, so that each source removes its own only.
    models: empty to ask the replica itself."""

    target: Target
    weight: float = 1.0
    limit: int = 0
    models: tuple[str, ...] = ()
    source: str = "flags"


class _Watched:
    """One replica and the keeper's notes on it."""

    def __init__(
        self,
        spec: ReplicaSpec,
        member: Member,
        heard: ReportedPrefixes,
        health_probe: HealthProbe,
        backoff: Backoff,
    ) -> None:
        self.spec = spec
        self.member = member
        self.heard = heard
        self.health_probe = health_probe
        self.backoff = backoff
        self.ejected_until = 0.0
        self.proven = False  # a step has been seen since it was last out
        self.proven_at = 0.0
        self.ended = 0
        self.cards: list[dict[str, Any]] = []
        self.tasks: list[asyncio.Task[None]] = []


class HealthMonitor:
    """All replicas, and the tasks that watch them. listeners: called with every new list.
    by_prefix: requests are picked by prefixes, so replicas are asked for theirs."""

    def __init__(
        self,
        counters: SharedCounters,
        policy: HealthPolicy,
        worker_key: str | None = None,
        *,
        by_prefix: bool = False,
    ) -> None:
        self._counters = counters
        self._policy = policy
        self._headers = (("Authorization", f"Bearer {worker_key}"),) if worker_key else ()
        self._by_prefix = by_prefix
        self._watched: dict[int, _Watched] = {}
        self._next_id = 0
        self._next_slot = 0
        self._running = False
        self.listeners: list[Callable[[list[Member]], None]] = []

    @property
    def members(self) -> list[Member]:
        """All replicas, in the order of their slots."""
        return sorted((w.member for w in self._watched.values()), key=lambda m: m.slot)

    @property
    def cards(self) -> list[dict[str, Any]]:
        """What healthy replicas say of their models, one entry a name."""
        cards: dict[str, dict[str, Any]] = {}
        for watched in self._watched.values():
            for card in watched.cards if watched.member.state != "down" else ():
                cards.setdefault(card["id"], card)
        return list(cards.values())

    # --- membership ------------------------------------------------------------------------------

    def add(self, spec: ReplicaSpec) -> Member:
        """Watch one more replica. Raises UserError when it is there already, or cannot be."""
        if spec.target.prefix:
            raise UserError(f"{spec.target}: a replica's URL has no path; give http://host:port")
        if any(w.spec.target == spec.target for w in self._watched.values()):
            raise UserError(f"{spec.target}: this replica is there already")
        if not 0.0 < spec.weight <= 1000.0:
            raise UserError(f"{spec.target}: weight {spec.weight}: use a number above 0, to 1000")
        member = Member(
            id=self._next_id,
            slot=self._free_slot(),
            target=spec.target,
            weight=spec.weight,
            limit=spec.limit,
            models=spec.models,
        )
        self._next_id += 1
        heard = ReportedPrefixes(self._counters, member.slot)
        backoff = Backoff(BackoffPolicy(self._policy.backoff, self._policy.backoff_limit))
        watched = _Watched(spec, member, heard, self._health_probe(spec.target), backoff)
        self._watched[member.id] = watched
        if self._running:
            self._watch(watched)
        self._publish()
        return member

    def remove(self, id: int) -> None:
        """Forget a replica now; what it carries is continued elsewhere."""
        watched = self._watched.pop(id)
        for task in watched.tasks:
            task.cancel()
        self._publish()

    def drain(self, id: int, *, then_remove: bool) -> None:
        """Give a replica no more requests; remove it, if told, once it has none."""
        watched = self._watched[id]
        self._set(watched, state="draining", reason="draining")
        if then_remove:
            watched.tasks.append(asyncio.create_task(self._remove_when_empty(watched)))

    def undrain(self, id: int) -> None:
        """Give a drained replica requests again, once a check says that it is well."""
        watched = self._watched[id]
        if watched.member.state == "draining":
            self._set(watched, state="down", reason="to be checked")

    def set_weight(self, id: int, weight: float) -> None:
        """Change a replica's share of the load. Raises UserError for a weight that cannot be."""
        if not 0.0 < weight <= 1000.0:
            raise UserError(f"weight {weight}: use a number above 0, to 1000")
        self._set(self._watched[id], weight=weight)

    def sync(self, source: str, specs: Sequence[ReplicaSpec]) -> None:
        """Make this source's replicas exactly these: others of its own drain and go."""
        wanted = {spec.target: spec for spec in specs}
        for id, watched in list(self._watched.items()):
            target = watched.spec.target
            if target not in wanted:
                if watched.spec.source == source and watched.member.state != "draining":
                    self.drain(id, then_remove=True)
            elif watched.spec.source == source:
                if watched.member.state == "draining":
                    self.undrain(id)
                if wanted[target].weight != watched.member.weight:
                    self.set_weight(id, wanted[target].weight)
        there = {watched.spec.target for watched in self._watched.values()}
        for target, spec in wanted.items():
            if target not in there:
                self.add(spec)

    def find(self, id: int) -> Member | None:
        """The replica of that id."""
        watched = self._watched.get(id)
        return watched.member if watched is not None else None

    def _free_slot(self) -> int:
        taken = {watched.member.slot for watched in self._watched.values()}
        if len(taken) >= MAX_REPLICAS:
            raise UserError(f"{MAX_REPLICAS} replicas are there, as many as one gateway takes")
        # The slot freed longest ago: a process may still write to one freed just now.
        while self._next_slot % MAX_REPLICAS in taken:
            self._next_slot += 1
        slot = self._next_slot % MAX_REPLICAS
        self._next_slot += 1
        self._counters.clear_replica(slot)
        return slot

    def _health_probe(self, target: Target) -> HealthProbe:
        policy = self._policy
        return HealthProbe(
            target,
            self._headers,
            timeout=policy.timeout,
            probe_timeout=policy.probe_timeout,
            misses=policy.misses,
        )

    async def _remove_when_empty(self, watched: _Watched) -> None:
        member = watched.member
        while self._under_way(member):
            await asyncio.sleep(0.02)
        if watched.member.state == "draining" and member.id in self._watched:
            watched.tasks = [t for t in watched.tasks if t is not asyncio.current_task()]
            self.remove(member.id)

    def _under_way(self, member: Member) -> int:
        return self._counters.total(member.slot, IN_FLIGHT)

    def _set(self, watched: _Watched, **changes: Any) -> None:
        changed = msgspec.structs.replace(watched.member, **changes)
        if changed != watched.member:
            watched.member = changed
            self._publish()

    def _publish(self) -> None:
        members = self.members
        for listener in self.listeners:
            listener(members)

    # --- what requests meet ----------------------------------------------------------------------

    def report(self, id: int, reason: str | None) -> None:
        """A request met a failure at a replica, or (None) was answered in full after one."""
        watched = self._watched.get(id)
        if watched is None:
            return
        if reason is None:
            watched.backoff.reset()
            self._set(watched, failing=False)
            return
        now = time.monotonic()
        if now < watched.ejected_until:
            return  # one death fails many requests; it counts once
        watched.ejected_until = now + watched.backoff.failed()
        self._out(watched, reason, failing=True)

    def _out(self, watched: _Watched, reason: str, **changes: Any) -> None:
        watched.proven = False
        if watched.member.state == "draining":
            self._set(watched, **changes)
        else:
            self._set(watched, state="down", reason=reason, **changes)

    # --- watching --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Check every replica once, then watch them until `stop`."""
        await asyncio.gather(*(self.check(id, first=True) for id in list(self._watched)))
        self._running = True
        for watched in self._watched.values():
            self._watch(watched)

    async def stop(self) -> None:
        """End the watching."""
        self._running = False
        tasks = [task for watched in self._watched.values() for task in watched.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _watch(self, watched: _Watched) -> None:
        watched.tasks.append(asyncio.create_task(self._check_again_and_again(watched)))
        if self._policy.load_interval > 0:
            watched.tasks.append(asyncio.create_task(self._ask_for_load(watched)))

    async def _check_again_and_again(self, watched: _Watched) -> None:
        while True:
            if watched.member.reason != "not checked yet":
                await asyncio.sleep(self._policy.interval)
            await self.check(watched.member.id)

    async def check(self, id: int, *, first: bool = False) -> None:
        """One health check; it changes health, never the load counters. first: the gateway itself
        is starting, so there is nothing for a slow start to protect."""
        watched = self._watched[id]
        problem = await watched.health_probe.problem()
        if problem is DOUBT:
            return
        if problem is None:
            if not watched.cards:
                await self._ask_models(watched)
            if time.monotonic() < watched.ejected_until:
                return
            if self._must_prove(watched):
                problem = await self._probe(watched)
        if id not in self._watched:
            return
        if problem is not None:
            self._out(watched, problem.text, lost=watched.member.lost or problem.lost)
        elif watched.member.state == "down":
            ramp = None if first else time.monotonic()
            watched.heard.forget()
            self._set(watched, state="up", reason="", lost=False, ramp_from=ramp)

    async def _ask_models(self, watched: _Watched) -> None:
        """Learn which models it serves, and what kind of server it is."""
        offer = await watched.health_probe.offer()
        if offer is not None:
            watched.cards = offer.cards
            names = watched.spec.models or offer.names
            self._set(watched, models=names, kind=offer.kind)

    def _must_prove(self, watched: _Watched) -> bool:
        ended = self._counters.total(watched.member.slot, ENDED)
        now = time.monotonic()
        if ended != watched.ended and watched.proven:
            watched.ended, watched.proven_at = ended, now
        idle = self._policy.idle_probe
        stale = 0 < idle < now - watched.proven_at and not self._under_way(watched.member)
        return not watched.proven or stale

    async def _probe(self, watched: _Watched) -> Problem | None:
        """Have it prove that it can run a step. None if it did."""
        models = watched.member.models
        problem = await watched.health_probe.probe(models[0] if models else None)
        if problem is None:
            watched.proven, watched.proven_at = True, time.monotonic()
        return problem

    # --- load ------------------------------------------------------------------------------------

    async def _ask_for_load(self, watched: _Watched) -> None:
        """Correct the load that we count by what it says it carries; learn what it holds."""
        reports = LoadReports(watched.spec.target, self._headers)
        counters, slot = self._counters, watched.member.slot
        try:
            while True:
                await asyncio.sleep(reports.pause(self._policy.load_interval))
                if watched.member.state == "down":
                    counters.correct(slot, 0)
                    continue
                tokens, requests = counters.total(slot, RESIDENT), counters.total(slot, IN_FLIGHT)
                since = watched.heard.since if self._by_prefix else None
                report = await reports.info(watched.member.kind, since)
                if report is not None and report.prefixes is not None:
                    watched.heard.take(report.prefixes, since)
                if report is not None:
                    counted = (tokens + counters.total(slot, RESIDENT)) // 2
                    requests = max(requests, counters.total(slot, IN_FLIGHT))
                    target = report.correction(counted, requests)
                    # Half way each time: a request on its way there is not in the report yet.
                    counters.correct(slot, (counters.correction(slot) + target) // 2)
        finally:
            reports.close()
