"""The requests that wait, by rank, and who of them may be admitted before an earlier one.

A request may be passed by later ones while the step has no tokens for it, or the cache no pages.
Two rules bound that. The last free slot is for the first in line. And while a request is the first
of those that lacked pages, at most OVERTAKES later ones enter; then all that run end, their pages
come free, and it is the next. The line knows no page and no budget; it is told who found none.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from millrace.engine.request import Phase, Request

WINDOW = 256  # requests, by rank, that a step considers
OVERTAKES = 16
REFUSALS = 4  # in one step; each has looked the prompt up for nothing


class WaitingLine:
    """Waiting requests, sorted by rank."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._front: deque[Request] = deque()  # of this step's candidates, those not yet passed
        self._hungry: Request | None = None  # the first of those that lacked pages
        self._refusals = 0

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> None:
        insort(self._requests, request, key=rank)

    def remove(self, request: Request) -> None:
        self._requests.remove(request)
        if self._hungry is request:
            self._hungry = None

    def candidates(self, held_back: Callable[[Request], bool]) -> list[Request]:
        """Those that a new step considers, by rank. held_back: who had better not run yet."""
        found = [request for request in islice(self._requests, WINDOW) if not held_back(request)]
        self._front, self._refusals = deque(found), 0
        return found

    def may_enter(self, request: Request, free_slots: int) -> bool:
        """Whether a candidate may be admitted now, as far as those before it go."""
        while self._front and self._front[0].phase is not Phase.WAITING:
            self._front.popleft()
        if free_slots < 2 and (not free_slots or request is not self._front[0]):
            return False
        return self._refusals < REFUSALS and not self._passes_hungry(request, OVERTAKES)

    def admitted(self, request: Request) -> None:
        """The request leaves the line."""
        if self._hungry is not None and self._passes_hungry(request, 0):
            self._hungry.overtaken += 1
        self.remove(request)

    def refused(self, request: Request) -> None:
        """Pages were not there for the request."""
        self._refusals += 1
        if self._hungry is None or rank(request) < rank(self._hungry):
            self._hungry = request

    def _passes_hungry(self, request: Request, overtaken: int) -> bool:
        """Whether it would pass one that lacks pages and has been passed so often."""
        hungry = self._hungry
        return hungry is not None and rank(hungry) < rank(request) and hungry.overtaken >= overtaken


def rank(request: Request) -> tuple[int, int]:
    """Requests of a lower rank come first."""
    return request.source.priority, request.ordinal
