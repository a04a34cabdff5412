"""One endpoint as the dispatcher sees it: how many requests it may have, and whether it works.

Each endpoint has a window of requests in flight. It takes the next request when one is answered, so
each gets the share that it finishes. Status 429 halves the window, answers widen it again. An
endpoint that fails is set aside for a while, longer each time, and then tried with one request.
"""

from __future__ import annotations

from millrace.batch.endpoint import Answer, Endpoint, Verdict
from millrace.common.backoff import Backoff, BackoffPolicy

FAILURES = 3  # in a row, after which an endpoint is set aside
BUSY_SECONDS = 1.0  # to wait after a 429 that does not say for how long
_ASIDE = BackoffPolicy(first=1.0, longest=30.0, settled=float("inf"))
_SMOOTH = 0.1  # weight of the newest latency


class Window:
    """An endpoint with its window. most: requests in flight at most. Times are of one clock, in
    seconds."""

    def __init__(self, endpoint: Endpoint, most: int) -> None:
        self.endpoint = endpoint
        self.in_flight = 0
        self.finished = 0
        self.latency = 0.0  # seconds of an answer, smoothed
        self.problem = ""  # why it is set aside or shut
        self.shut = False
        self._most = most
        self._size = float(most)
        self._failures = 0
        self._backoff = Backoff(_ASIDE)
        self._closed_until = 0.0
        self._trying = False
        self._busy = False

    @property
    def size(self) -> int:
        """Requests that it may have in flight now."""
        return 1 if self._trying else max(1, int(self._size))

    def has_room(self, now: float) -> bool:
        """Whether it may get a request now."""
        return not self.shut and now >= self._closed_until and self.in_flight < self.size

    @property
    def opens_at(self) -> float:
        """When it may get requests again, as far as time decides that."""
        return float("inf") if self.shut else self._closed_until

    @property
    def works(self) -> bool:
        """Whether it is neither shut nor set aside, and did not ask to wait."""
        return not (self.shut or self._trying or self._busy)

    def sent(self) -> None:
        """A request has been sent there."""
        self.in_flight += 1

    def answered(self, answer: Answer, began: float, now: float) -> bool:
        """An answer has come. True if the endpoint has been set aside or shut by it."""
        self.in_flight -= 1
        verdict = answer.verdict
        if verdict in (Verdict.KEEP, Verdict.REFUSED):
            self._worked(now - began)
        elif verdict is Verdict.BUSY:
            self._wait(answer, began, now)
        elif verdict is Verdict.SHUT:
            return not self.finished and self._shut(answer)
        else:
            return self._failed(answer, began, now)
        return False

    def _shut(self, answer: Answer) -> bool:
        self.problem, was_shut, self.shut = answer.reason, self.shut, True
        return not was_shut

    def _worked(self, seconds: float) -> None:
        self.finished += 1
        self.shut = self._busy = False
        self.latency += (seconds - self.latency) * (_SMOOTH if self.latency else 1.0)
        self._failures = 0
        self._trying = False
        self.problem = ""
        self._backoff.reset()
        self._size = min(self._most, self._size + 1.0 / max(1.0, self._size))

    def _wait(self, answer: Answer, began: float, now: float) -> None:
        """Send less for a time. Of answers to what was sent before that, each asks for the same."""
        pause = answer.retry_after if answer.retry_after is not None else BUSY_SECONDS
        if began >= self._closed_until:
            self._size = max(1.0, self._size / 2)
        self._closed_until = max(self._closed_until, now + pause)
        self.problem = answer.reason
        self._busy = True
        self._trying = self._trying or answer.status == 503

    def _failed(self, answer: Answer, began: float, now: float) -> bool:
        if began < self._closed_until:  # sent before it was set aside
            return False
        self._failures += 1
        if self._failures < FAILURES and answer.reached and not self._trying:
            return False
        self.problem = answer.reason
        self._closed_until = now + self._backoff.failed()
        newly = not self._trying
        self._trying = True
        return newly
