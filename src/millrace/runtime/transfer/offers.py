"""The records that others may take: by name, each until its lease ends.

A record may be offered while its prompt is still computed: then it grows, and its lease begins once
it is whole.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

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

    def has_more(self, pages: int) -> bool:
        """Whether there is something behind so many pages of it, or nothing will come."""
        move = self.move
        return bool(move.refused) or move.ready < 0 or move.ready > pages

    def is_late(self, now: float) -> bool:
        return self.until < now and self.move.ready < 0 and not self.readers


class Reading:
    """One who takes an offered record, part by part."""

    def __init__(self, offer: _Offer, changed: threading.Condition) -> None:
        self._offer, self._changed = offer, changed
        self.move = offer.move

    def ready(self, pages: int, seconds: float) -> int:
        """How many of its first pages may be taken, once there are more than `pages`; -1: all of
        it. Raises LookupError that says why nothing more comes."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._offer.has_more(pages), seconds):
                raise LookupError(f"no more of the record was computed in {seconds:g} s")
            if self._offer.move.refused:
                raise LookupError(self._offer.move.refused)
            return self._offer.move.ready


class Offers:
    """Of one engine. Any thread may call it."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._offers: dict[str, _Offer] = {}
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._offers)

    def add(self, move: RecordMove) -> Future[Moved]:
        """Offer a record. The result: whether it was taken."""
        offer = _Offer(move, self._now() + move.seconds)
        with self._changed:
            self._offers[move.name] = offer
            self._changed.notify_all()
        return offer.ended

    def grow(self, move: RecordMove) -> None:
        """More of an offered record may be taken, or none of it after all."""
        with self._changed:
            offer = self._offers.get(move.name)
            if offer is None:  # nobody can take it any more
                return
            offer.move, offer.until = move, self._now() + move.seconds
            if move.refused:  # a word for whoever asks
                self._offers[move.name] = _Offer(move, offer.until)
            self._changed.notify_all()
        if move.refused:
            offer.ended.set_result(Moved(False, move.refused))

    @contextmanager
    def reading(self, name: str, seconds: float) -> Iterator[Reading]:
        """The record, which stays where it is until the context is left. It may not be there yet:
        waits so long. Raises LookupError that says why there is none."""
        with self._changed:
            self._changed.wait_for(lambda: name in self._offers or self._closed, seconds)
            offer = self._offers.get(name)
            if offer is None:
                raise LookupError("no such record is offered; its lease may have ended")
            if offer.move.refused:
                raise LookupError(offer.move.refused)
            offer.readers += 1
        try:
            yield Reading(offer, self._changed)
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
            if offer is not None and not moved.succeeded:
                offer.move = msgspec.structs.replace(offer.move, refused=moved.error)
                self._changed.notify_all()
        if offer is not None:
            offer.ended.set_result(moved)

    def expire(self) -> None:
        """Give up what nobody has taken in time."""
        now = self._now()
        with self._changed:
            late = [name for name, one in self._offers.items() if one.is_late(now)]
        for name in late:
            self.end(name, Moved(False, "its lease has ended"))

    def close(self) -> None:
        """Give up everything, and let nobody wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for name in list(self._offers):
            self.end(name, Moved(False, "the engine ends"))
