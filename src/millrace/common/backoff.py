"""How long to wait before something that failed is tried again.

One policy for engines, replicas, gateway processes and requests: the pause doubles with each
failure in a row, up to a limit. What failed and how it is started again is not known here.
"""

from __future__ import annotations

import msgspec


class BackoffPolicy(msgspec.Struct, frozen=True):
    """first, longest: the first pause and the limit of all, in seconds. settled: after so many
    seconds of service a failure is the first of a new row."""

    first: float = 1.0
    longest: float = 30.0
    settled: float = 60.0

    def pause(self, failures: int) -> float:
        """Seconds to wait after this many failures in a row, 1 or more."""
        return min(self.first * 2.0 ** min(failures - 1, 64), self.longest)


class Backoff:
    """The failures in a row of one thing that is started again and again."""

    def __init__(self, policy: BackoffPolicy) -> None:
        self._policy = policy
        self.failures = 0

    def failed(self, served: float = 0.0) -> float:
        """Count a failure after `served` seconds of service; the seconds to wait now."""
        self.failures = 1 if served > self._policy.settled else self.failures + 1
        return self._policy.pause(self.failures)

    def reset(self) -> None:
        """It works: the next failure is the first of a new row."""
        self.failures = 0
