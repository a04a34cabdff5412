"""A clock on which nothing waits: calls come in the order of their times, one after the other.

Calls of one moment come in the order in which they were asked for, so a run depends on nothing but
what is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class VirtualTimer:
    """A call that is to come."""

    __slots__ = ("arguments", "call")

    def __init__(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.call: Callable[..., Any] | None = call
        self.arguments = arguments

    def cancel(self) -> None:
        self.call, self.arguments = None, ()


class VirtualClock:
    """Seconds since the start of a run, and the calls that are to come."""

    def __init__(self) -> None:
        self._now = 0.0
        self._order = 0
        self._calls: list[tuple[float, int, VirtualTimer]] = []

    def now(self) -> float:
        return self._now

    def call_later(self, seconds: float, call: Callable[..., Any], *arguments: Any) -> VirtualTimer:
        return self.call_at(self._now + seconds, call, *arguments)

    def call_at(self, moment: float, call: Callable[..., Any], *arguments: Any) -> VirtualTimer:
        """Call at that moment; now if it has passed."""
        timer = VirtualTimer(call, arguments)
        self._order += 1
        heappush(self._calls, (max(moment, self._now), self._order, timer))
        return timer

    @property
    def next_call(self) -> float:
        """When the next call is due; infinity if none is."""
        while self._calls and self._calls[0][2].call is None:
            heappop(self._calls)
        return self._calls[0][0] if self._calls else math.inf

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        """Make the calls that are due up to that moment, in their order; stop once `done`. The
        clock then stands at the last call, or at `until` if it has come so far."""
        while self._calls and not done():
            moment, _, timer = self._calls[0]
            if moment > until:
                break
            heappop(self._calls)
            self._now = moment
            if timer.call is not None:
                timer.call(*timer.arguments)
        if not done():
            self._now = max(self._now, until)
