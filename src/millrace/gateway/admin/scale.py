"""How many replicas the load asks for: the content of GET /gateway/scale.

An autoscaler reads it (KEDA's metrics-api trigger needs no Prometheus) and starts or stops
replicas; the gateway does neither. Requests that run or wait, over what one replica is meant to
have at a time, give the number. It grows at once. It shrinks to the largest number of the last
`down_after` seconds, so that a pause between two bursts stops nothing, and to zero only after
`zero_after` seconds without a request. Where answers began too late at some load of each replica,
it does not shrink to that load again for a while: else it would rise and fall for ever.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from millrace.gateway.common.clock import LOOP_CLOCK, Clock
from millrace.gateway.common.limits import ScalePolicy
from millrace.gateway.common.shared_counters import FIRST_BYTE_BOUNDS, SharedCounters
from millrace.gateway.routing.replicas import Member

SAMPLE_SECONDS = 1.0
FIRST_BYTE_SECONDS = 30.0  # of the latest answers that are compared with the objective
FEWEST_ANSWERS = 20  # fewer say nothing about a 95th percentile
SLOW_MEMORY = 6.0  # times `scale_down_after`: so long a load that was too high is remembered


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of all gateway processes, the replicas that are up or still end requests, and
    `first_byte_p95`."""

    running: int
    queued: int
    held: int
    up: int
    draining: int
    first_byte_p95: float | None

    @property
    def requests(self) -> int:
        return self.running + self.queued + self.held


class ScaleAdvisor:
    """Samples the load once a second; `document` is what /gateway/scale says."""

    def __init__(
        self,
        counters: SharedCounters,
        members: Callable[[], Sequence[Member]],
        policy: ScalePolicy,
        clock: Clock = LOOP_CLOCK,
    ) -> None:
        self._counters = counters
        self._members = members
        self._policy = policy
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque()  # (moment, replicas that were asked for)
        self._first_bytes: deque[tuple[float, list[int], float]] = deque()  # .., load of a replica
        self._up = 0
        self._slow_load = math.inf  # requests of each replica with which answers began too late
        self._slow_at = -math.inf
        self._busy_at = -math.inf  # the last moment with a request
        self._answered = 0

    def load(self) -> Load:
        gauge = self._counters.gauge
        states = [member.state for member in self._members()]
        return Load(
            running=gauge("interactive") + gauge("batch"),
            queued=gauge("queued_interactive") + gauge("queued_batch"),
            held=gauge("held"),
            up=states.count("up"),
            draining=states.count("draining"),
            first_byte_p95=self.first_byte_p95(),
        )

    def sample(self) -> None:
        """Take note of the load now; called once a second."""
        now, load = self._clock.now(), self.load()
        answered = self._counters.events()["relayed_requests"]  # not those to the gateway itself
        if load.requests or answered != self._answered:  # short requests end between two samples
            self._busy_at, self._answered = now, answered
        self._note_first_bytes(now, load)
        self._note_slow_load(now, load)
        self._samples.append((now, self._asked_for(load)))
        while self._samples[0][0] < now - self._policy.scale_down_after:
            self._samples.popleft()

    def _note_first_bytes(self, now: float, load: Load) -> None:
        if load.up > self._up:  # answers of fewer replicas say nothing about these
            self._first_bytes.clear()
        self._up = load.up
        each = load.requests / max(load.up, 1)
        self._first_bytes.append((now, self._counters.first_byte_counts(), each))
        while self._first_bytes[0][0] < now - FIRST_BYTE_SECONDS:
            self._first_bytes.popleft()

    def _note_slow_load(self, now: float, load: Load) -> None:
        if self._is_slow(load):
            self._slow_load = max(each for _, _, each in self._first_bytes)
            self._slow_at = now
        elif now - self._slow_at > SLOW_MEMORY * self._policy.scale_down_after:
            self._slow_load = math.inf

    def first_byte_p95(self) -> float | None:
        """An upper bound, in seconds, of the 95th percentile of the latest answers; None where
        there were too few."""
        if not self._first_bytes:
            return None
        latest = self._counters.first_byte_counts()
        counts = [b - a for a, b in zip(self._first_bytes[0][1], latest, strict=True)]
        total, seen = sum(counts), 0
        if total < FEWEST_ANSWERS:
            return None
        for bound, count in zip((*FIRST_BYTE_BOUNDS, math.inf), counts, strict=True):
            seen += count
            if seen >= 0.95 * total:
                return bound
        return math.inf

    def _asked_for(self, load: Load) -> int:
        """What the load of this moment asks for, between the bounds."""
        policy = self._policy
        wanted = math.ceil(load.requests / policy.scale_requests)
        if self._is_slow(load) and load.requests and load.up:
            wanted = max(wanted, load.up + 1)
        wanted = max(wanted, self._kept(load), policy.scale_min)
        return min(wanted, policy.scale_max) if policy.scale_max else wanted

    def _kept(self, load: Load) -> int:
        """Of the replicas that are up, those without which answers began too late lately."""
        if not load.requests or math.isinf(self._slow_load):
            return 0
        return min(load.up, int(load.requests / max(self._slow_load, 1e-9)) + 1)

    def _is_slow(self, load: Load) -> bool:
        objective, p95 = self._policy.scale_first_byte, load.first_byte_p95
        return bool(objective) and p95 is not None and p95 > objective

    def document(self) -> dict[str, Any]:
        """The answer to GET /gateway/scale."""
        load = self.load()
        now_asked = self._asked_for(load)
        wanted = max([now_asked, *(asked for _, asked in self._samples)])
        idle = self._clock.now() - self._busy_at
        if not wanted and load.up and idle < self._policy.scale_zero_after:
            wanted = 1
        p95 = load.first_byte_p95
        return {
            "wanted": wanted,
            "up": load.up,
            "draining": load.draining,
            "running": load.running,
            "queued": load.queued,
            "held": load.held,
            "requests_per_replica": self._policy.scale_requests,
            "first_byte_p95": None if p95 is None or math.isinf(p95) else p95,
            "reason": self._reason(load, now_asked, wanted),
        }

    def _reason(self, load: Load, asked: int, wanted: int) -> str:
        policy = self._policy
        by_count = math.ceil(load.requests / policy.scale_requests)
        if wanted > asked:
            return f"what was wanted in the last {policy.scale_down_after:g} s"
        if asked == policy.scale_max and by_count >= asked:
            return "as many as --scale-max allows"
        if asked > by_count:
            if self._is_slow(load) and load.requests:
                return "answers begin later than --scale-first-byte"
            if asked == self._kept(load):
                return "answers of fewer replicas began later than --scale-first-byte"
            return "--scale-min"
        if not load.requests:
            return "no requests"
        return f"{load.requests} requests, {policy.scale_requests} for each replica"
