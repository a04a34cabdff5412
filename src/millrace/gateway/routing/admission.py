"""Admission control: which requests run now, which wait, and which are refused.

Two service classes, interactive and batch, each with a limit over all processes and a bounded queue
in each process. Free capacity goes to the interactive queue first. The running requests are counted
in the shared counters, so processes agree except for requests that start in the same microsecond.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol

from millrace.gateway.common.clock import LOOP_CLOCK, Clock, Timer
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.common.shared_counters import ProcessCounters, SharedCounters
from millrace.gateway.http.request_info import RequestInfo, ServiceClass

CLASSES: tuple[ServiceClass, ...] = ("interactive", "batch")
_POLL = 0.005  # seconds between checks while requests wait: other processes free capacity too


class QueuedRequest(Protocol):
    """A request that waits for admission (exchange.py)."""

    info: RequestInfo

    def has_capacity(self) -> bool:
        """Whether a replica could take it now; true as well if no replica is left."""
        ...

    def admitted(self) -> None:
        """It may run now."""
        ...


class AdmissionControl:
    """The two queues of one process."""

    def __init__(
        self,
        counters: SharedCounters,
        process_counters: ProcessCounters,
        limits: GatewayLimits,
        clock: Clock = LOOP_CLOCK,
    ) -> None:
        self._clock = clock
        self._counters = counters
        self._process_counters = process_counters
        self._limit = {
            "interactive": limits.max_concurrent_requests,
            "batch": limits.max_concurrent_batch,
        }
        self._queue_limit = {"interactive": limits.queue_size, "batch": limits.batch_queue_size}
        self._queues: dict[ServiceClass, deque[QueuedRequest]] = {name: deque() for name in CLASSES}
        self._timer: Timer | None = None
        self._dispatching = False
        self._rate = 1.0  # requests that end per second, smoothed
        self._last_end = clock.now()

    def waiting(self, service: ServiceClass) -> int:
        """Requests of this class that wait in this process."""
        return len(self._queues[service])

    def admitted_count(self, service: ServiceClass) -> int:
        """Running requests of this class, over all processes."""
        return self._counters.gauge(service)

    def submit(self, exchange: QueuedRequest) -> str | None:
        """Admit a request now or queue it; `exchange.admitted()` is called when it may run.
        Returns the reason why it may not even wait, else None."""
        service = exchange.info.service_class
        queue = self._queues[service]
        if not queue and self._admit(exchange, service):
            return None
        if len(queue) >= self._queue_limit[service]:
            self._process_counters.count_event("queue_refused")
            limit = self._limit[service]
            return f"{limit} {service} requests may run at once and {len(queue)} wait already"
        queue.append(exchange)
        self._process_counters.add_gauge(f"queued_{service}", 1)
        self._schedule_dispatch()
        return None

    def cancel_wait(self, exchange: QueuedRequest) -> None:
        """Remove a request from its queue."""
        service = exchange.info.service_class
        if exchange in self._queues[service]:
            self._queues[service].remove(exchange)
            self._process_counters.add_gauge(f"queued_{service}", -1)

    def release(self, service: ServiceClass) -> None:
        """An admitted request has ended."""
        self._process_counters.add_gauge(service, -1)
        now = self._clock.now()
        since, self._last_end = max(now - self._last_end, 1e-4), now
        self._rate += 0.05 * (1.0 / since - self._rate)
        self.dispatch()

    def retry_after(self, service: ServiceClass) -> int:
        """Seconds after which the requests that wait now should have been admitted."""
        wait = (self.waiting(service) + 1) / max(self._rate, 0.1)
        return min(60, max(1, math.ceil(wait)))

    def dispatch(self) -> None:
        """Admit waiting requests while there is capacity."""
        if self._dispatching:  # an admitted request that fails at once comes back here
            return
        self._dispatching = True
        try:
            for service in CLASSES:
                self._dispatch_class(service)
        finally:
            self._dispatching = False
        if any(self._queues.values()):
            self._schedule_dispatch()

    def _dispatch_class(self, service: ServiceClass) -> None:
        queue = self._queues[service]
        blocked: list[QueuedRequest] = []
        models: set[str | None] = set()
        while queue:
            exchange = queue.popleft()
            if exchange.info.model in models or not self._admit(exchange, service, queued=True):
                blocked.append(exchange)
                models.add(exchange.info.model)
                if self._counters.gauge(service) >= self._limit[service]:
                    break
        queue.extendleft(reversed(blocked))

    def _admit(self, exchange: QueuedRequest, service: ServiceClass, queued: bool = False) -> bool:
        if self._counters.gauge(service) >= self._limit[service] or not exchange.has_capacity():
            return False
        if queued:
            self._process_counters.add_gauge(f"queued_{service}", -1)
        self._process_counters.add_gauge(service, 1)
        exchange.admitted()
        return True

    def _schedule_dispatch(self) -> None:
        if self._timer is None:
            self._timer = self._clock.call_later(_POLL, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.dispatch()
