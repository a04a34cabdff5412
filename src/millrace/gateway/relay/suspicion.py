"""One request's own evidence against it: the replicas that failed while they had it.

It decides when a request is sent to no other replica. What other copies of it did, and how long
they are refused, is known in routing/suspects.py and health/evidence.py.
"""

from __future__ import annotations

from millrace.gateway.routing.suspects import MAX_REPLICAS_TO_FAIL, FailureBurst


class Suspicion:
    """failures: replicas that failed in a row without a new output token in between."""

    def __init__(self) -> None:
        self.failures = 0
        self._tokens = 0
        self._first_burst: FailureBurst | None = None

    def has_failed_before(self, failures: int) -> None:
        """Earlier copies of the request met failures: this one gets a single replica."""
        self.failures = min(failures, MAX_REPLICAS_TO_FAIL - 1)

    def add(self, burst: FailureBurst, tokens: int) -> bool:
        """A replica failed, after `tokens` output tokens in all. Returns whether it was the last.

        A failure counts together with earlier ones unless there were new tokens in between. A
        stream that had tokens, and whose first failure other requests shared, may be the victim of
        one of them and gets one more replica.
        """
        if tokens > self._tokens:
            self.failures = 0
        self._tokens = tokens
        if self.failures == 0:
            self._first_burst = burst
        self.failures += 1
        victim = tokens > 0 and self._first_burst is not None and self._first_burst.count > 1
        return self.failures >= MAX_REPLICAS_TO_FAIL + victim
