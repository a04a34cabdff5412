"""Waits for a device that end, for threads beside the steps. Knows no ranks: `Ranks.wait` does."""

from __future__ import annotations

import time
from typing import Protocol

_POLL_SECONDS = 0.0005


class Ready(Protocol):
    """An event on a device, or a stream of it."""

    def query(self) -> bool:
        """Whether it has come; of a stream: whether all its work is done."""


def comes_within(ready: Ready, seconds: float) -> bool:
    """Wait until it has come; False if it does not in that time."""
    end = time.monotonic() + seconds
    while not ready.query():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    return True
