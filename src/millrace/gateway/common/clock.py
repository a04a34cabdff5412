"""Time, as code sees it that can run on another clock: the moment, and calls that come later.

A process uses `LOOP_CLOCK`: the monotonic clock, and timers of the running event loop. The
simulator has a clock of its own, on which nothing waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol


class Timer(Protocol):
    """A call that is to come."""

    def cancel(self) -> None:
        """It does not come. Without effect once it has."""
        ...


class Clock(Protocol):
    """Seconds since any moment; they never go back."""

    def now(self) -> float:
        """The moment."""
        ...

    def call_later(self, seconds: float, call: Callable[..., Any], *arguments: Any) -> Timer:
        """Call `call(*arguments)` after so many seconds."""
        ...


class LoopClock:
    """The monotonic clock of this host. `call_later` needs a running event loop."""

    def now(self) -> float:
        return time.monotonic()

    def call_later(self, seconds: float, call: Callable[..., Any], *arguments: Any) -> Timer:
        return asyncio.get_running_loop().call_later(seconds, call, *arguments)


LOOP_CLOCK = LoopClock()
