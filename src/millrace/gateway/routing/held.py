"""Requests that wait for a first replica: none is up, and one may be on its way.

They are bounded in number and in time; their bodies count among those of running requests. Once
replicas come, requests go out in the order in which they came, so many at a time for each replica,
so that the second replica gets its share of what waited for the first. Newer requests stand behind
them. It holds the requests of one process, and decides nothing about which replica gets one.
"""

from __future__ import annotations

from typing import Protocol

from millrace.gateway.common.clock import LOOP_CLOCK, Clock, Timer
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.common.shared_counters import ProcessCounters

_POLL = 0.05  # seconds between two looks for replicas


class HeldRequest(Protocol):
    """A request that no replica can take now (exchange.py)."""

    def has_room(self, most: int) -> bool:
        """Whether an available replica has fewer than `most` requests."""
        ...

    def released(self) -> None:
        """It may go on."""
        ...

    def hold_timed_out(self) -> None:
        """It has waited as long as it may."""
        ...


class HeldRequests:
    """The held requests of one process, oldest first."""

    def __init__(
        self, process_counters: ProcessCounters, limits: GatewayLimits, clock: Clock = LOOP_CLOCK
    ) -> None:
        self._process_counters = process_counters
        self._limits = limits
        self._clock = clock
        self._held: dict[HeldRequest, float] = {}  # -> the moment at which its time is over
        self._timer: Timer | None = None

    def __len__(self) -> int:
        return len(self._held)

    @property
    def is_on(self) -> bool:
        """Whether requests are held at all."""
        return self._limits.hold_timeout > 0

    @property
    def is_full(self) -> bool:
        """Whether no more requests may wait."""
        return len(self._held) >= self._limits.hold_size

    def hold(self, request: HeldRequest) -> None:
        """Keep a request; `released` or `hold_timed_out` is called later. Not when full."""
        self._held[request] = self._clock.now() + self._limits.hold_timeout
        self._process_counters.add_gauge("held", 1)
        self._schedule()

    def cancel(self, request: HeldRequest) -> None:
        """Forget a request that has ended otherwise."""
        if self._held.pop(request, None) is not None:
            self._process_counters.add_gauge("held", -1)

    def _schedule(self) -> None:
        if self._timer is None and self._held:
            self._timer = self._clock.call_later(_POLL, self._look)

    def _look(self) -> None:
        self._timer = None
        now = self._clock.now()
        for request, end in list(self._held.items()):
            if request not in self._held:
                continue  # another one's end has ended it
            if request.has_room(self._limits.hold_per_replica):
                self.cancel(request)
                request.released()
            elif now >= end:
                self.cancel(request)
                request.hold_timed_out()
        self._schedule()
