"""Copies of a request wait for the first of them: what it does says what the others would do.

Of a request that kills replicas many copies may come at once, before there is any evidence against
it. So while no copy has brought output, one of them runs and the others wait, for MOST_SECONDS at
most. The first output lets all of them go; a first copy on which replicas failed condemns them. If
it ends in another way, the next one runs. This is known for the requests of one gateway process;
what happened before is known in suspects.py. With two replicas or fewer nobody needs to wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import Protocol

MOST_SECONDS = 1.0


class Copy(Protocol):
    """One request (exchange.py)."""

    def go(self) -> None:
        """It may be sent now."""
        ...

    def condemn(self, reason: str) -> None:
        """Replicas have failed on another copy: it is sent to none."""
        ...


class _Group:
    """The copies that are here. first: the one that runs while nothing is known."""

    def __init__(self, first: Copy) -> None:
        self.first: Copy | None = first
        self.count = 1
        self.harmless = False
        self.waiting: dict[Copy, asyncio.TimerHandle] = {}


class FirstCopies:
    """The copies of one process, by what makes them the same."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, _Group] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def enter(self, key: Hashable, copy: Copy) -> None:
        """A copy has come: it goes now or later. Each one that enters must leave."""
        group = self._groups.get(key)
        if group is None:
            self._groups[key] = _Group(copy)
            copy.go()
            return
        group.count += 1
        if group.harmless or group.first is None:
            copy.go()
            return
        loop = asyncio.get_running_loop()
        group.waiting[copy] = loop.call_later(MOST_SECONDS, self._release, group, copy)

    def harmless(self, key: Hashable) -> None:
        """A copy has brought output: none has to wait any more."""
        group = self._groups[key]
        if not group.harmless:
            group.harmless = True
            for copy in list(group.waiting):
                self._release(group, copy)

    def condemn(self, key: Hashable, reason: str) -> None:
        """Replicas have failed on a copy: those that wait are not sent."""
        group = self._groups[key]
        waiting, group.waiting = group.waiting, {}
        for copy, timer in waiting.items():
            timer.cancel()
            copy.condemn(reason)

    def leave(self, key: Hashable, copy: Copy) -> None:
        """A copy has ended."""
        group = self._groups[key]
        group.count -= 1
        if group.count == 0:
            del self._groups[key]
        if (timer := group.waiting.pop(copy, None)) is not None:
            timer.cancel()
        if group.first is copy:
            group.first = next(iter(group.waiting), None)
            if group.first is not None:
                self._release(group, group.first)

    def _release(self, group: _Group, copy: Copy) -> None:
        timer = group.waiting.pop(copy, None)
        if timer is not None:
            timer.cancel()
            copy.go()
