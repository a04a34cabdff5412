"""When slow work says how far it is."""

from __future__ import annotations

import time

PROGRESS_SECONDS = 5.0  # between two lines


class Due:
    """Tells slow work when its next line of progress is due. every: seconds."""

    def __init__(self, every: float) -> None:
        self._every, self._last = every, time.monotonic()

    def __bool__(self) -> bool:
        now = time.monotonic()
        if now - self._last <= self._every:
            return False
        self._last = now
        return True
