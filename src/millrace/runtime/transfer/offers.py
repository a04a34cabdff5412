"""The records that others may take: by name, each until its lease ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from millrace.protocol import RecordMove


class Moved(NamedTuple):
    """How a record's move has ended."""

    succeeded: bool
    error: str = ""
    bytes: int = 0
    seconds: float = 0.0
    pages: int = 0


@dataclass(slots=True)
class _Offer:
    """until: when the lease ends, seconds. readers: who take it now; it is theirs until they have
    ended. bytes: by taker, of those that have it."""

    move: RecordMove
    until: float
    ended: Future[Moved] = field(default_factory=Future)
    readers: int = 0
    bytes: dict[int, int] = field(default_factory=dict)


class Offers:
    """Of one engine. Any thread may call it."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._offers: dict[str, _Offer] = {}
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._offers)

    def add(self, move: RecordMove) -> Future[Moved]:
        """Offer a record. The result: whether it was taken."""
        offer = _Offer(move, self._now() + move.seconds)
        with self._changed:
            self._offers[move.name] = offer
            self._changed.notify_all()
        return offer.ended

    @contextmanager
    def reading(self, name: str, seconds: float) -> Iterator[RecordMove]:
        """The record, which stays where it is until the context is left. It may not be there yet:
        waits so long. Raises LookupError that says why there is none."""
        with self._changed:
            if not self._changed.wait_for(lambda: name in self._offers, seconds):
                raise LookupError("no such record is offered; its lease may have ended")
            offer = self._offers[name]
            if offer.move.refused:
                raise LookupError(offer.move.refused)
            offer.readers += 1
        try:
            yield offer.move
        finally:
            with self._changed:
                offer.readers -= 1
        self.expire()

    def taken(self, name: str, taker: int, takers: int, moved: Moved) -> None:
        """One of so many takers has it."""
        with self._changed:
            offer = self._offers.get(name)
            if offer is None:
                return
            offer.bytes[taker] = moved.bytes
            missing, size = takers - len(offer.bytes), sum(offer.bytes.values())
        if not missing:
            self.end(name, moved._replace(bytes=size))

    def end(self, name: str, moved: Moved) -> None:
        """It was taken, or nobody will take it."""
        with self._changed:
            offer = self._offers.pop(name, None)
        if offer is not None:
            offer.ended.set_result(moved)

    def expire(self) -> None:
        """Give up what nobody has taken in time."""
        now = self._now()
        with self._changed:
            late = [n for n, one in self._offers.items() if one.until < now and not one.readers]
        for name in late:
            self.end(name, Moved(False, "its lease has ended"))

    def close(self) -> None:
        """Give up everything."""
        for name in list(self._offers):
            self.end(name, Moved(False, "the engine ends"))
