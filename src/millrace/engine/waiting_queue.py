"""The requests that wait for admission, by rank, and which of them may overtake an earlier one.

A later request may be admitted first if the step has no tokens for an earlier one, or the KV cache
no pages. Two rules bound the wait of the earlier one:

- The last free slot is for the first request in the queue.
- While a request is the first of those that lack pages, at most MAX_OVERTAKES later ones are
  admitted. Then running requests end, their pages become free, and it is the next to be admitted.

The queue knows neither pages nor budget; the scheduler tells it which request lacked pages.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from millrace.engine.request import Phase, Request

WINDOW = 256  # requests at the head of the queue that a step considers
MAX_OVERTAKES = 16
MAX_FAILURES = 4  # admissions of one step that lack pages; each costs a prefix cache lookup


class WaitingQueue:
    """Waiting requests, sorted by rank."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._candidates: deque[Request] = deque()  # of this step; the first one still waits
        self._blocked: Request | None = None  # the first of those that lack pages
        self._failures = 0
        self.deferred = 0  # of the newest candidates: those that wait for a prefix

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def ends(self) -> list[Request]:
        """The requests of the first and of the last rank; none if nothing waits."""
        return [self._requests[0], self._requests[-1]] if self._requests else []

    @property
    def blocked(self) -> Request | None:
        """The first of those that lack pages."""
        return self._blocked

    def add(self, request: Request) -> None:
        insort(self._requests, request, key=rank)

    def remove(self, request: Request) -> None:
        self._requests.remove(request)
        if self._blocked is request:
            self._blocked = None

    def candidates(self, waits_for_prefix: Callable[[Request], bool]) -> list[Request]:
        """The requests that a new step considers, by rank, without those that wait for a prefix."""
        window = list(islice(self._requests, WINDOW))
        found = [request for request in window if not waits_for_prefix(request)]
        self.deferred = len(window) - len(found)
        self._candidates, self._failures = deque(found), 0
        return found

    def may_admit(self, request: Request, free_slots: int) -> bool:
        """Whether one of the step's candidates may be admitted before those that still wait."""
        while self._candidates and self._candidates[0].phase is not Phase.WAITING:
            self._candidates.popleft()
        if request is self._candidates[0]:
            return free_slots > 0
        if free_slots < 2 or self._failures == MAX_FAILURES:
            return False
        return not self._overtakes(request, MAX_OVERTAKES)

    def admitted(self, request: Request) -> None:
        """The request leaves the queue for a slot."""
        if self._blocked is not None and self._overtakes(request, 0):
            self._blocked.overtaken += 1
        self.remove(request)

    def lacks_pages(self, request: Request) -> None:
        """The request could not be admitted: too few pages."""
        self._failures += 1
        if self._blocked is None or rank(request) < rank(self._blocked):
            self._blocked = request

    def _overtakes(self, request: Request, times: int) -> bool:
        """Whether it ranks behind the blocked request, which was overtaken `times` or more."""
        blocked = self._blocked
        return blocked is not None and rank(blocked) < rank(request) and blocked.overtaken >= times


def rank(request: Request) -> tuple[bool, int, int]:
    """Requests of a lower rank come first: the background last, by priority, then by age."""
    return request.source.background, request.source.priority, request.ordinal
