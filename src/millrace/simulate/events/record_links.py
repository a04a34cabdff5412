"""Records of prompts between simulated replicas: what is offered, and when its bytes are there.

A replica's records leave it over one link, one after the other, each part once it is computed. So
of a long prompt most has gone when its last part is offered. Which replica takes what is not
decided here.
"""

from __future__ import annotations

from dataclasses import dataclass

LATENCY = 2e-3  # seconds of a hand-over beside its bytes


@dataclass(slots=True)
class _Record:
    """pages: that have been sent, or wait for the link. there: when the last byte arrives; whole:
    whether that is the record's last. taken: when the other replica had it; below 0: not yet.
    replica: that offers it."""

    replica: int
    pages: int = 0
    there: float = 0.0
    whole: bool = False
    bytes: int = 0
    taken: float = -1.0


class RecordLinks:
    """Of a fleet. speed: bytes a second of each replica's link; page_bytes, state_bytes: of a
    record's parts, of all ranks."""

    def __init__(self, speed: float, page_bytes: int, state_bytes: int) -> None:
        self._speed, self._page, self._state = speed, page_bytes, state_bytes
        self._records: dict[str, _Record] = {}
        self._gone: set[str] = set()
        self._free: dict[int, float] = {}  # by replica, when its link is
        self.bytes = 0  # that have been taken

    def offer(self, replica: int, name: str, pages: int, whole: bool, now: float) -> None:
        """So many of a record's first pages may be taken; whole: and its state."""
        one = self._records.setdefault(name, _Record(replica))
        size = (pages - one.pages) * self._page + whole * self._state
        start = max(now, self._free.get(replica, 0.0))
        self._free[replica] = one.there = start + size / self._speed
        one.pages, one.whole, one.bytes = pages, whole, one.bytes + size

    def withdraw(self, name: str) -> None:
        """Nobody can take it any more."""
        self._records.pop(name, None)
        self._gone.add(name)

    def lost(self, replica: int) -> None:
        """The replica has ended, and what it offered with it."""
        for name in [name for name, one in self._records.items() if one.replica == replica]:
            self.withdraw(name)

    def is_gone(self, name: str) -> bool:
        """Whether nobody can take it any more."""
        return name in self._gone

    def take(self, name: str, now: float) -> tuple[float, int] | None:
        """(when it is all there, its bytes), for a replica that asks now; None: it is not whole."""
        one = self._records.get(name)
        if one is None or not one.whole:
            return None
        one.taken = max(now, one.there) + LATENCY
        self.bytes += one.bytes
        return one.taken, one.bytes

    def was_taken(self, name: str, now: float) -> bool:
        """Whether the other replica has it by now."""
        one = self._records.get(name)
        return one is not None and 0 <= one.taken <= now
