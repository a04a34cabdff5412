"""The life of replicas: starts, crashes, spot reclaims, and the rule that scales their number.

Times of crashes and reclaims are drawn from a seed. A crash breaks connections at once. A machine
that vanishes is silent until the health monitor has missed enough checks. What happens to requests
is the gateway's business.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from random import Random

import msgspec

from millrace.gateway.common.replica_spec import HealthPolicy, Role
from millrace.gateway.routing.replicas import Member
from millrace.simulate.common.virtual_clock import VirtualClock
from millrace.target import Target

NOTICED = 0.01  # seconds until a check that a failed request has caused finds a crash
_DRAIN_LOOK = 0.5  # seconds between looks whether a drained replica is empty


class ScaleRule(msgspec.Struct, frozen=True, kw_only=True):
    """How a horizontal autoscaler (KEDA's, with an average value as target) sets the replicas.

    target: requests, running and waiting, for each replica. interval: seconds between two looks.
    tolerance: a ratio to the target so near to 1 changes nothing. stabilisation: seconds; it
    scales down to the largest number wanted in this time.
    """

    least: int
    most: int
    target: float
    interval: float = 15.0
    tolerance: float = 0.1
    stabilisation: float = 300.0


class LifeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """start_seconds: from the order of a replica to its first answer. crashes, reclaims: for each
    replica and hour. notice: seconds from a reclaim's notice to the end of the machine; 0: none.
    reclaim_wait: seconds until a machine is there instead. kills: (seconds, replica). prefill: of
    each `replicas`, those that compute prompts for the others; 0: each does everything.
    """

    replicas: int
    start_seconds: float = 0.0
    crashes: float = 0.0
    reclaims: float = 0.0
    notice: float = 30.0
    reclaim_wait: float = 60.0
    kills: tuple[tuple[float, int], ...] = ()
    scale: ScaleRule | None = None
    health: HealthPolicy = HealthPolicy()
    seed: int = 0
    prefill: int = 0

    @property
    def most(self) -> int:
        """Slots that are enough for all replicas, those that end among them."""
        if not (self.scale or self.reclaims):
            return self.replicas
        return 2 * max(self.replicas, self.scale.most if self.scale else 0) + 8


class Hooks(msgspec.Struct, frozen=True):
    """What the fleet does for the lives of replicas. begin: a member's engine. end: a member's id,
    and whether it ends in silence. publish: the members have changed. in_flight: requests of
    a member. load: requests in the fleet, running and waiting. clear: a slot is given again."""

    begin: Callable[[Member], None]
    end: Callable[[int, bool], None]
    publish: Callable[[list[Member]], None]
    in_flight: Callable[[int], int]
    load: Callable[[], int]
    clear: Callable[[int], None]


class Lives:
    """The members of a fleet and what happens to them."""

    def __init__(self, clock: VirtualClock, options: LifeOptions, hooks: Hooks) -> None:
        self._clock, self._options, self._hooks = clock, options, hooks
        self._random = Random(options.seed)
        self._members: dict[int, Member] = {}
        self._starting: set[int] = set()
        self._next = 0
        self._wanted: deque[tuple[float, int]] = deque()
        self.crashes = self.reclaims = self.starts = 0
        self._seconds = 0.0  # of replicas that exist
        self._counted_at = 0.0

    @property
    def up(self) -> int:
        return sum(one.state == "up" for one in self._members.values())

    @property
    def starting(self) -> int:
        return len(self._starting)

    @property
    def draining(self) -> int:
        return sum(one.state == "draining" for one in self._members.values())

    @property
    def replica_seconds(self) -> float:
        """Seconds that all replicas have existed together, starts included."""
        self._count()
        return self._seconds

    def begin(self) -> None:
        """The fleet is there, and what is to happen to it is set."""
        for _ in range(self._options.replicas):
            self._add(first=True)
        for moment, replica in self._options.kills:
            self._clock.call_at(moment, self._crash, replica)
        if self._options.scale is not None:
            self._clock.call_later(self._options.scale.interval, self._look)

    # --- one replica ---------------------------------------------------------------------------

    def _add(self, first: bool = False) -> None:
        self._count()
        id, self._next = self._next, self._next + 1
        taken = {one.slot for one in self._members.values()}
        # As the health monitor does: the slot that was freed longest ago.
        slot = next(s for n in range(self._options.most) if (s := self._slot(id + n)) not in taken)
        self._hooks.clear(slot)
        target = Target(f"replica-{id}", 8000)
        member = Member(id=id, slot=slot, target=target, role=self._role(slot))
        self._members[id] = member
        self._start(id, 0.0 if first else self._options.start_seconds, first)

    def _role(self, slot: int) -> Role:
        if not self._options.prefill:
            return ""
        return "prefill" if slot % self._options.replicas < self._options.prefill else "decode"

    def _slot(self, number: int) -> int:
        return number % self._options.most

    def _start(self, id: int, seconds: float, first: bool = False) -> None:
        """Its machine is there: it answers after so many seconds, and the next health check."""
        self._starting.add(id)
        if not first:
            self.starts += 1
            seconds += self._options.health.health_check_interval / 2
        if seconds > 0:
            self._clock.call_later(seconds, self._answers, id, first)
        else:
            self._answers(id, first)

    def _answers(self, id: int, first: bool) -> None:
        if id not in self._members:
            return
        self._starting.discard(id)
        self._hooks.begin(self._members[id])
        since = None if first else self._clock.now()
        self._set(id, state="up", reason="", lost=False, slow_start_from=since)
        self._draw(id, self._options.crashes, self._crash)
        self._draw(id, self._options.reclaims, self._reclaim)

    def _draw(self, id: int, per_hour: float, happens: Callable[[int], None]) -> None:
        if per_hour > 0:
            life = self._starts_of(id)
            seconds = self._random.expovariate(per_hour / 3600)
            self._clock.call_later(seconds, self._if_same_life, id, life, happens)

    def _starts_of(self, id: int) -> int:
        """Tells one life of a member from the next."""
        return hash(self._members[id].slow_start_from)

    def _if_same_life(self, id: int, life: int, happens: Callable[[int], None]) -> None:
        if id in self._members and self._starts_of(id) == life:
            happens(id)

    def _crash(self, id: int) -> None:
        """The process dies; it is started again on its machine."""
        if self._is_dead(id):
            return
        self.crashes += 1
        self._hooks.end(id, False)
        self._clock.call_later(NOTICED, self._lost, id)
        self._start(id, self._options.start_seconds)

    def _reclaim(self, id: int) -> None:
        """The machine is taken away, with or without notice; another one comes."""
        if self._is_dead(id):
            return
        self.reclaims += 1
        if self._options.notice > 0:
            self._set(id, state="draining", reason="reclaimed")
        self._clock.call_later(self._options.notice, self._vanish, id)
        wait = self._options.reclaim_wait
        self._clock.call_later(wait, self._replace)

    def _replace(self) -> None:
        rule = self._options.scale
        if rule is None or len(self._living) < rule.most:
            self._add()

    def _vanish(self, id: int) -> None:
        if id not in self._members:
            return
        self._hooks.end(id, True)
        health = self._options.health
        silent = health.health_check_interval
        silent += health.max_missed_checks * health.health_check_timeout
        self._clock.call_later(silent, self._remove, id)

    def _is_dead(self, id: int) -> bool:
        return id not in self._members or id in self._starting

    def _lost(self, id: int) -> None:
        if id in self._members:
            self._set(id, state="down", reason="lost", lost=True)

    def _remove(self, id: int) -> None:
        """It leaves the list; requests that it still has go to other replicas."""
        self._count()
        if self._members.pop(id, None) is not None:
            self._starting.discard(id)
            self._publish()
            self._hooks.end(id, False)

    def _drain(self, id: int) -> None:
        self._set(id, state="draining", reason="scaled down")
        self._when_empty(id)

    def _when_empty(self, id: int) -> None:
        if id in self._members and self._hooks.in_flight(id):
            self._clock.call_later(_DRAIN_LOOK, self._when_empty, id)
        else:
            self._remove(id)

    def _set(self, id: int, **changes: object) -> None:
        self._members[id] = msgspec.structs.replace(self._members[id], **changes)
        self._publish()

    def _publish(self) -> None:
        self._hooks.publish(sorted(self._members.values(), key=lambda one: one.slot))

    def _count(self) -> None:
        now = self._clock.now()
        self._seconds += (now - self._counted_at) * len(self._members)
        self._counted_at = now

    # --- the number of replicas ------------------------------------------------------------------

    @property
    def _living(self) -> list[int]:
        """Replicas that take requests or will."""
        return [one.id for one in self._members.values() if one.state != "draining"]

    def _look(self) -> None:
        rule = self._options.scale
        assert rule is not None
        now, living = self._clock.now(), self._living
        wanted = wanted_replicas(rule, self._hooks.load(), len(living))
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - rule.stabilisation:
            self._wanted.popleft()
        lowest = max(count for _, count in self._wanted)
        for _ in range(max(0, wanted - len(living))):
            self._add()
        # The youngest go first: what they have cached is the least.
        for id in sorted(living, reverse=True)[: max(0, len(living) - lowest)]:
            if id in self._starting:
                self._remove(id)
            else:
                self._drain(id)
        self._clock.call_later(rule.interval, self._look)


def wanted_replicas(rule: ScaleRule, load: int, replicas: int) -> int:
    """What the rule wants of a fleet of so many replicas with so many requests."""
    if replicas and abs(load / (replicas * rule.target) - 1.0) <= rule.tolerance:
        return min(rule.most, max(rule.least, replicas))
    return min(rule.most, max(rule.least, math.ceil(load / rule.target)))
