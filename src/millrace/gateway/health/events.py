"""What happened to the replicas of a gateway: a bounded list of events, each logged as it comes.

Changes of state are read from the lists of members that the health monitor publishes. Whoever runs
the replicas adds what it does to them. Who shows the events is not known here.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from millrace.dashboard.stream import Event
from millrace.gateway.routing.replicas import NOT_CHECKED, Member

logger = logging.getLogger("millrace.gateway")

EventKind = Literal["added", "up", "down", "draining", "removed", "ended", "killed", "replaced"]
MAX_EVENTS = 1000
_TROUBLE = ("down", "ended", "killed")


class FleetEvents:
    """The latest events of a gateway. name: of a replica, as people know it."""

    def __init__(self, name: Callable[[Member], str]) -> None:
        self._name = name
        self._states: dict[int, tuple[str, EventKind]] = {}  # id -> name, and what it is
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._number = 0

    def add(self, kind: EventKind, replica: str, text: str = "") -> None:
        """Record and log an event."""
        self._number += 1
        self._events.append(Event(self._number, time.time(), kind, replica, text))
        level = logging.WARNING if kind in _TROUBLE else logging.INFO
        if kind == "added":  # its first check follows
            level = logging.DEBUG
        logger.log(level, "replica %s %s%s", replica, kind, f": {text}" if text else "")

    def since(self, number: int) -> list[Event]:
        """Events after that number, the oldest first."""
        return [event for event in self._events if event.number > number]

    def update(self, members: Sequence[Member]) -> None:
        """Compare the members with the last ones, and record what has changed."""
        for id in self._states.keys() - {member.id for member in members}:
            self.add("removed", self._states.pop(id)[0])
        for member in members:
            self._compare(member)

    def _compare(self, member: Member) -> None:
        name, before = self._name(member), self._states.get(member.id)
        unchecked = member.state == "down" and member.reason == NOT_CHECKED
        kind: EventKind = "added" if unchecked and before is None else member.state
        if before is None or (before[1] != kind and not unchecked):
            self._states[member.id] = name, kind
            self.add(kind, name, member.reason if kind == "down" else "")
