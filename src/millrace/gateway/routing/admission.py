"""Who may go on to a replica now, who waits, and who is told to come again.

Two service classes, interactive and batch, each with a limit of its own over all processes and a
bounded queue in each. A place that becomes free goes to the interactive queue first. Limits are
read from the board, so processes agree to within the requests that start in the same microsecond.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from typing import Protocol

from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.common.shared_counters import Part, SharedCounters
from millrace.gateway.http.request_info import RequestInfo, ServiceClass

CLASSES: tuple[ServiceClass, ...] = ("interactive", "batch")
_POLL = 0.005  # seconds between looks while somebody waits: places become free elsewhere too


class Applicant(Protocol):
    """A request that wants a place (exchange.py)."""

    info: RequestInfo

    def has_room(self) -> bool:
        """Whether a replica could take it now; also when none is left to wait for."""
        ...

    def admitted(self) -> None:
        """It has a place."""
        ...


class AdmissionControl:
    """The two queues of one process."""

    def __init__(self, counters: SharedCounters, part: Part, limits: GatewayLimits) -> None:
        self._counters = counters
        self._part = part
        self._limit = {"interactive": limits.max_in_flight, "batch": limits.max_batch}
        self._room = {"interactive": limits.queue, "batch": limits.batch_queue}
        self._queues: dict[ServiceClass, deque[Applicant]] = {name: deque() for name in CLASSES}
        self._timer: asyncio.TimerHandle | None = None
        self._pumping = False
        self._rate = 1.0  # requests that end in a second, smoothed
        self._last_end = time.monotonic()

    def waiting(self, service: ServiceClass) -> int:
        """Requests of this class that wait here."""
        return len(self._queues[service])

    def under_way(self, service: ServiceClass) -> int:
        """Requests of this class that have a place, over all processes."""
        return self._counters.live(service)

    def enter(self, exchange: Applicant) -> str | None:
        """Let a request in, now or later: `exchange.admitted()` is called once it has a place.
        Returns the reason why it may not even wait, else None."""
        service = exchange.info.service
        queue = self._queues[service]
        if not queue and self._admit(exchange, service):
            return None
        if len(queue) >= self._room[service]:
            self._part.event("queue_refused")
            limit = self._limit[service]
            return f"{limit} {service} requests may be under way and {len(queue)} wait already"
        queue.append(exchange)
        self._part.live(f"queued_{service}", 1)
        self._look_again()
        return None

    def leave_queue(self, exchange: Applicant) -> None:
        """It waits no longer."""
        service = exchange.info.service
        if exchange in self._queues[service]:
            self._queues[service].remove(exchange)
            self._part.live(f"queued_{service}", -1)

    def leave(self, service: ServiceClass) -> None:
        """A request that had a place has ended."""
        self._part.live(service, -1)
        now = time.monotonic()
        since, self._last_end = max(now - self._last_end, 1e-4), now
        self._rate += 0.05 * (1.0 / since - self._rate)
        self.pump()

    def retry_after(self, service: ServiceClass) -> int:
        """Seconds after which those who wait now should have been served."""
        wait = (self.waiting(service) + 1) / max(self._rate, 0.1)
        return min(60, max(1, math.ceil(wait)))

    def pump(self) -> None:
        """Give free places to those who wait."""
        if self._pumping:  # an admitted request that fails at once gives its place back
            return
        self._pumping = True
        try:
            for service in CLASSES:
                self._pump_class(service)
        finally:
            self._pumping = False
        if any(self._queues.values()):
            self._look_again()

    def _pump_class(self, service: ServiceClass) -> None:
        queue = self._queues[service]
        blocked: list[Applicant] = []
        models: set[str | None] = set()
        while queue:
            exchange = queue.popleft()
            if exchange.info.model in models or not self._admit(exchange, service, queued=True):
                blocked.append(exchange)
                models.add(exchange.info.model)
                if self._counters.live(service) >= self._limit[service]:
                    break
        queue.extendleft(reversed(blocked))

    def _admit(self, exchange: Applicant, service: ServiceClass, queued: bool = False) -> bool:
        if self._counters.live(service) >= self._limit[service] or not exchange.has_room():
            return False
        if queued:
            self._part.live(f"queued_{service}", -1)
        self._part.live(service, 1)
        exchange.admitted()
        return True

    def _look_again(self) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_POLL, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.pump()
