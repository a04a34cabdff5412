"""Rate limits: a bucket of tokens for each session, and for each address that logs in."""

from __future__ import annotations

import time
from collections import OrderedDict

MOST_KEYS = 10_000


class RateLimit:
    """burst at once, then `rate` a second. Known keys are bounded: the oldest is forgotten."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, burst
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allow(self, key: str, now: float | None = None) -> bool:
        now = time.monotonic() if now is None else now
        left, at = self._left.pop(key, (float(self._burst), now))
        left = min(float(self._burst), left + (now - at) * self._rate)
        allowed = left >= 1
        self._left[key] = (left - 1 if allowed else left, now)
        if len(self._left) > MOST_KEYS:
            self._left.popitem(last=False)
        return allowed
