"""One clock for all samples of a run, and how far the clocks of other machines are from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime


class Clock:
    """Seconds since 1970 that never jump: the wall clock at the start, and what has passed."""

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic = monotonic
        self._offset = wall() - monotonic()

    def now(self) -> float:
        return self._offset + self._monotonic()


class ClockOffset:
    """How far another clock is ahead, in seconds, from Date headers, which are whole seconds.

    An answer whose Date is D was made between its request and its end, at D to D + 1 there. So
    each answer bounds the offset, and answers at various parts of a second narrow it.
    """

    def __init__(self) -> None:
        self.low, self.high = float("-inf"), float("inf")

    def add(self, date: str, sent: float, received: float) -> None:
        try:
            there = parsedate_to_datetime(date).timestamp()
        except (TypeError, ValueError):
            return
        low, high = there - received, there + 1 - sent
        if low > self.high or high < self.low:  # that clock was set
            self.low, self.high = low, high
        else:
            self.low, self.high = max(self.low, low), min(self.high, high)

    @property
    def known(self) -> bool:
        return self.high - self.low < float("inf")

    @property
    def offset(self) -> float:
        """The middle of what is possible."""
        return (self.low + self.high) / 2

    @property
    def error(self) -> float:
        return (self.high - self.low) / 2
