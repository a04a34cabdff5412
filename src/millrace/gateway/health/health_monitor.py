"""The health of each replica, checked here once for all gateway processes.

Health has three sources: GET /health every second; a completion of one token, which needs a real
step, before a replica gets its first request, before it comes back, and after an idle time; and the
failures that requests meet. A failed replica stays out for a time that doubles with each failure in
a row. Load reports correct the load that the gateway counts itself. How replicas are asked is in
probes.py and load_report.py. The monitor publishes what it knows as a list of Members to its
listeners.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import msgspec

from millrace.common.backoff import Backoff, BackoffPolicy
from millrace.common.http_client import Target
from millrace.common.tasks import restarted
from millrace.dashboard.sample import Sample
from millrace.errors import UserError
from millrace.gateway.common.replica_spec import HealthPolicy as HealthPolicy
from millrace.gateway.common.replica_spec import ReplicaSpec as ReplicaSpec
from millrace.gateway.common.replica_spec import check_spec
from millrace.gateway.common.shared_counters import (
    ENDED,
    IN_FLIGHT,
    MAX_REPLICAS,
    RESIDENT,
    SharedCounters,
)
from millrace.gateway.health.evidence import (
    ReplicaEvidence,
    RequestEvidence,
    may_eject,
)
from millrace.gateway.health.load_report import LoadReports, correct_load
from millrace.gateway.health.probes import UNCERTAIN, HealthProbe, Problem
from millrace.gateway.routing.prefix_index import ReportedPrefixes
from millrace.gateway.routing.replicas import NOT_CHECKED, Member
from millrace.gateway.routing.suspects import (
    BURST_SECONDS,
    Failure,
    Outcome,
    Success,
    Suspect,
)

logger = logging.getLogger("millrace.gateway")

_SAMPLE_SECONDS = 1.0
_MODELS_SECONDS = 10.0  # between two readings of the models of a healthy replica


class _Monitored:
    """One replica and what the monitor knows of it."""

    def __init__(
        self,
        spec: ReplicaSpec,
        member: Member,
        reported_prefixes: ReportedPrefixes,
        health_probe: HealthProbe,
        backoff: Backoff,
    ) -> None:
        self.spec = spec
        self.member = member
        self.reported_prefixes = reported_prefixes
        self.health_probe = health_probe
        self.backoff = backoff
        self.ejected_until = 0.0
        self.probe_passed = False  # it has completed a token since it was last down
        self.last_success = 0.0
        self.completed = 0
        self.cards: list[dict[str, Any]] = []
        self.served_models: tuple[str, ...] = ()  # as the replica itself says
        self.models_read_at = 0.0
        self.evidence = ReplicaEvidence()
        self.verified_at = 0.0  # when a failed request last caused a check
        self.verifying = False
        self.leaving = False  # it is removed when its last request has ended
        self.tasks: list[asyncio.Task[None]] = []


class HealthMonitor:
    """All replicas and the tasks that check them. listeners: called with every new list.
    on_samples: called with a replica's id and what it says of its last seconds. by_prefix: the
    policy uses prefixes, so replicas are asked for theirs."""

    def __init__(
        self,
        counters: SharedCounters,
        policy: HealthPolicy,
        replica_key: str | None = None,
        *,
        by_prefix: bool = False,
        log: Callable[[str], None] = logger.warning,
    ) -> None:
        self._counters = counters
        self._policy = policy
        self._headers = (("Authorization", f"Bearer {replica_key}"),) if replica_key else ()
        self._by_prefix = by_prefix
        self._log = log
        self._monitored: dict[int, _Monitored] = {}
        self._next_id = 0
        self._next_slot = 0
        self._running = False
        self._requests = RequestEvidence(policy.suspect_timeout)
        self.listeners: list[Callable[[list[Member]], None]] = []
        self.suspect_listeners: list[Callable[[Suspect], None]] = []
        self.on_samples: Callable[[int, list[Sample]], None] = lambda id, samples: None

    @property
    def members(self) -> list[Member]:
        """All replicas, in the order of their slots."""
        return sorted((w.member for w in self._monitored.values()), key=lambda m: m.slot)

    @property
    def cards(self) -> list[dict[str, Any]]:
        """The model cards of the healthy replicas, one per name."""
        cards: dict[str, dict[str, Any]] = {}
        for monitored in self._monitored.values():
            for card in monitored.cards if monitored.member.state != "down" else ():
                cards.setdefault(card["id"], card)
        return list(cards.values())

    # --- membership ------------------------------------------------------------------------------

    def add(self, spec: ReplicaSpec) -> Member:
        """Add a replica and check it. Raises UserError if it is there already or is not valid."""
        if spec.target.prefix or spec.target.query:
            raise UserError(f"{spec.target}: a replica's URL has no path; give http://host:port")
        if any(w.spec.target == spec.target for w in self._monitored.values()):
            raise UserError(f"{spec.target}: this replica exists already")
        check_spec(spec)
        member = Member(
            id=self._next_id,
            slot=self._free_slot(),
            target=spec.target,
            weight=spec.weight,
            limit=spec.limit,
            models=spec.models,
            role=spec.role,
        )
        self._next_id += 1
        reported_prefixes = ReportedPrefixes(self._counters, member.slot)
        backoff = Backoff(BackoffPolicy(self._policy.backoff, self._policy.backoff_limit))
        monitored = _Monitored(
            spec, member, reported_prefixes, self._health_probe(spec.target), backoff
        )
        self._monitored[member.id] = monitored
        if self._running:
            self._watch(monitored)
        self._publish()
        return member

    def remove(self, id: int) -> None:
        """Remove a replica now; its running requests go to other replicas."""
        monitored = self._monitored.pop(id)
        self._requests.forget_replica(id)
        for task in monitored.tasks:
            task.cancel()
        self._publish()

    def drain(self, id: int, *, then_remove: bool) -> None:
        """Send a replica no new requests; then_remove: remove it when its last one has ended."""
        monitored = self._monitored[id]
        self._set(monitored, state="draining", reason="draining")
        if then_remove and not monitored.leaving:
            monitored.leaving = True
            self._run(monitored, "the removal", self._remove_when_empty)

    def undrain(self, id: int) -> None:
        """Send a drained replica requests again, after a successful check."""
        monitored = self._monitored[id]
        monitored.leaving = False
        if monitored.member.state == "draining":
            self._set(monitored, state="down", reason="to be checked")

    def set_weight(self, id: int, weight: float) -> None:
        """Change a replica's share of requests. Raises UserError for a weight out of range."""
        if not 0.0 < weight <= 1000.0:
            raise UserError(f"weight {weight}: use a number above 0, to 1000")
        self._set(self._monitored[id], weight=weight)

    def sync(self, source: str, specs: Sequence[ReplicaSpec]) -> None:
        """Make this source's replicas exactly these: its others are drained and removed. One that
        was drained by hand stays so."""
        wanted = {spec.target: spec for spec in specs}
        for id, monitored in list(self._monitored.items()):
            target = monitored.spec.target
            if target not in wanted:
                if monitored.spec.source == source:
                    self.drain(id, then_remove=True)
            elif monitored.spec.source == source:
                if monitored.leaving:
                    self.undrain(id)
                self._configure(monitored, wanted[target])
        there = {monitored.spec.target for monitored in self._monitored.values()}
        for target, spec in wanted.items():
            if target not in there:
                self.add(spec)

    def _configure(self, monitored: _Monitored, spec: ReplicaSpec) -> None:
        """Apply every field of a source's new entry for a replica."""
        if spec != monitored.spec:
            check_spec(spec)
            monitored.spec = spec
            models = spec.models or monitored.served_models
            role = spec.role or monitored.health_probe.role
            self._set(monitored, weight=spec.weight, limit=spec.limit, models=models, role=role)

    def find(self, id: int) -> Member | None:
        """The replica of that id."""
        monitored = self._monitored.get(id)
        return monitored.member if monitored is not None else None

    def _free_slot(self) -> int:
        taken = {monitored.member.slot for monitored in self._monitored.values()}
        if len(taken) >= MAX_REPLICAS:
            raise UserError(
                f"{MAX_REPLICAS} replicas exist already, as many as one gateway supports"
            )
        # The slot that was freed longest ago: a process may still write to one freed just now.
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
            timeout=policy.health_check_timeout,
            probe_timeout=policy.probe_timeout,
            misses=policy.max_missed_checks,
        )

    async def _remove_when_empty(self, monitored: _Monitored) -> None:
        member = monitored.member
        while monitored.leaving and self._in_flight(member):
            await asyncio.sleep(0.02)
        if monitored.leaving and member.id in self._monitored:
            monitored.tasks = [t for t in monitored.tasks if t is not asyncio.current_task()]
            self.remove(member.id)

    def _in_flight(self, member: Member) -> int:
        return self._counters.replica_total(member.slot, IN_FLIGHT)

    def _set(self, monitored: _Monitored, **changes: Any) -> None:
        changed = msgspec.structs.replace(monitored.member, **changes)
        if changed != monitored.member:
            monitored.member = changed
            self._publish()

    def _publish(self) -> None:
        members = self.members
        for listener in self.listeners:
            listener(members)

    # --- failures of requests --------------------------------------------------------------------

    def report(self, id: int, outcome: Outcome) -> None:
        """A request met a failure at a replica, or was answered in full after failures."""
        monitored = self._monitored.get(id)
        if isinstance(outcome, Success):
            if monitored is not None:
                monitored.backoff.reset()
                monitored.evidence.clear()
                self._set(monitored, failing=False)
            self._publish_suspect(self._requests.clear(outcome.digest))
        elif monitored is not None:
            if outcome.reached:
                self._suspect_request(monitored, outcome)
            if not outcome.lost:
                self._suspect_replica(monitored, outcome)

    def _suspect_request(self, monitored: _Monitored, failure: Failure) -> None:
        suspect = self._requests.add(monitored.member.id, monitored.spec.target, failure)
        self._publish_suspect(suspect)
        if suspect.refused:
            asyncio.get_running_loop().call_later(
                BURST_SECONDS,
                lambda: self._publish_suspect(self._requests.review(failure.digest)),
            )

    def _suspect_replica(self, monitored: _Monitored, failure: Failure) -> None:
        """Eject a replica at which several different requests failed in a row; before that, have a
        check decide."""
        self._set(monitored, failing=True)
        failed = monitored.evidence.add(failure)
        limit = self._policy.consecutive_failures
        if monitored.member.state == "down":
            return
        if failed >= limit and may_eject(monitored.member, self.members):
            monitored.ejected_until = time.monotonic() + monitored.backoff.failed()
            reason = f"{failed} different requests failed in a row; the last: {failure.reason}"
            self._take_down(monitored, reason)
        else:
            self._verify_soon(monitored)

    def _verify_soon(self, monitored: _Monitored) -> None:
        """Check a replica now because a request failed there, once per second at most."""
        now = time.monotonic()
        pause = min(1.0, self._policy.health_check_interval)
        if monitored.verifying or not self._running or now - monitored.verified_at < pause:
            return
        monitored.verifying, monitored.verified_at = True, now
        self._run(monitored, "the check after a failure", self._verify)

    async def _verify(self, monitored: _Monitored) -> None:
        try:
            await self.check(monitored.member.id, verify=True)
        finally:
            monitored.verifying = False
            monitored.tasks = [t for t in monitored.tasks if t is not asyncio.current_task()]

    def _publish_suspect(self, suspect: Suspect | None) -> None:
        if suspect is not None:
            for listener in self.suspect_listeners:
                listener(suspect)

    def _take_down(self, monitored: _Monitored, reason: str, **changes: Any) -> None:
        monitored.probe_passed = False
        if monitored.member.state == "draining":
            self._set(monitored, **changes)
        else:
            self._set(monitored, state="down", reason=reason, **changes)

    # --- checks ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Check every replica once, then repeatedly until `stop`."""
        await asyncio.gather(*(self.check(id, first=True) for id in list(self._monitored)))
        self._running = True
        for monitored in self._monitored.values():
            self._watch(monitored)

    async def stop(self) -> None:
        """End the checks."""
        self._running = False
        tasks = [task for monitored in self._monitored.values() for task in monitored.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _watch(self, monitored: _Monitored) -> None:
        self._run(monitored, "the health checks", self._check_loop)
        if self._policy.load_interval > 0:
            self._run(monitored, "the load reports", self._load_loop)

    def _run(
        self,
        monitored: _Monitored,
        name: str,
        work: Callable[[_Monitored], Coroutine[Any, Any, None]],
    ) -> None:
        task = restarted(f"{name} of {monitored.spec.target}", partial(work, monitored), self._log)
        monitored.tasks.append(task)

    async def _check_loop(self, monitored: _Monitored) -> None:
        while True:
            if monitored.member.reason != NOT_CHECKED:
                await asyncio.sleep(self._policy.health_check_interval)
            await self.check(monitored.member.id)

    async def check(self, id: int, *, first: bool = False, verify: bool = False) -> None:
        """One health check; it changes health, never the load counters. first: the gateway itself
        is starting, so no slow start is needed. verify: with a completion in any case."""
        monitored = self._monitored.get(id)
        if monitored is None:
            return
        problem = await monitored.health_probe.check_health()
        if problem is UNCERTAIN:
            return
        if problem is None:
            probe = monitored.health_probe
            role = monitored.spec.role or probe.role
            tag, records = probe.response_tag, probe.records
            self._set(monitored, response_tag=tag, role=role, records=records)
            if self._must_read_models(monitored):
                await self._read_models(monitored)
            if time.monotonic() < monitored.ejected_until:
                return
            if verify or self._needs_probe(monitored):
                problem = await self._probe(monitored)
        if id not in self._monitored:
            return
        if problem is not None:
            if verify and monitored.member.state == "up":
                monitored.ejected_until = time.monotonic() + monitored.backoff.failed()
            self._take_down(monitored, problem.text, lost=monitored.member.lost or problem.lost)
        elif monitored.member.state == "down":
            ramp = None if first else time.monotonic()
            monitored.reported_prefixes.forget()
            monitored.evidence.clear()
            self._set(monitored, state="up", reason="", lost=False, slow_start_from=ramp)

    async def _read_models(self, monitored: _Monitored) -> None:
        """Read which models it serves, and which kind of server it is."""
        served = await monitored.health_probe.read_models()
        monitored.models_read_at = time.monotonic()
        if served is not None:
            monitored.cards, monitored.served_models = served.cards, served.names
            names = monitored.spec.models or served.names
            self._set(monitored, models=names, kind=served.kind)

    def _must_read_models(self, monitored: _Monitored) -> bool:
        """Whether its models may have changed: it is coming back, or was asked a while ago."""
        age = time.monotonic() - monitored.models_read_at
        return not monitored.cards or monitored.member.state == "down" or age > _MODELS_SECONDS

    def _needs_probe(self, monitored: _Monitored) -> bool:
        ended = self._counters.replica_total(monitored.member.slot, ENDED)
        now = time.monotonic()
        if ended != monitored.completed and monitored.probe_passed:
            monitored.completed, monitored.last_success = ended, now
        idle = self._policy.idle_probe
        stale = 0 < idle < now - monitored.last_success and not self._in_flight(monitored.member)
        return not monitored.probe_passed or stale

    async def _probe(self, monitored: _Monitored) -> Problem | None:
        """Have it complete one token. Returns what is wrong; None if it succeeded."""
        models = monitored.member.models
        problem = await monitored.health_probe.check_completion(models[0] if models else None)
        if problem is None:
            monitored.probe_passed, monitored.last_success = True, time.monotonic()
        return problem

    # --- load ------------------------------------------------------------------------------------

    async def _load_loop(self, monitored: _Monitored) -> None:
        """Correct the counted load by its load reports; read its prefixes."""
        reports = LoadReports(monitored.spec.target, self._headers)
        counters, slot = self._counters, monitored.member.slot
        newest, asked = 0, 0.0  # the second of its newest sample, and when samples were asked for
        try:
            while True:
                await asyncio.sleep(reports.next_delay(self._policy.load_interval))
                if monitored.member.state == "down":
                    counters.set_load_correction(slot, 0)
                    continue
                tokens, requests = (
                    counters.replica_total(slot, RESIDENT),
                    counters.replica_total(slot, IN_FLIGHT),
                )
                cursor = monitored.reported_prefixes.cursor if self._by_prefix else None
                due = time.monotonic() - asked >= _SAMPLE_SECONDS
                asked = time.monotonic() if due else asked
                report = await reports.read(monitored.member.kind, cursor, newest if due else None)
                if report is not None and report.prefixes is not None:
                    monitored.reported_prefixes.apply(report.prefixes, cursor)
                if report is not None and report.samples:
                    # At first it tells a minute of its past, which is no news.
                    self.on_samples(
                        monitored.member.id, report.samples if newest else report.samples[-1:]
                    )
                    newest = report.samples[-1].at
                if report is not None:
                    correct_load(counters, slot, report, tokens, requests)
        finally:
            reports.close()
