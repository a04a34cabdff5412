"""What a viewer of the live page gets: first all that is known, then what each second brings.

Every message is a server-sent event with JSON. A viewer that comes back says the last id that it
has seen, and gets only what followed. Who sends them, and when, is not known here.
"""

from __future__ import annotations

from typing import Any

import msgspec

from millrace.dashboard.history import History, json_list
from millrace.dashboard.sample import BOUNDS, FIELDS, STEP_KINDS

MAX_VIEWERS = 32  # of one process; each holds a connection
CONTENT_TYPE = "text/event-stream; charset=utf-8"
_FORMAT = 1  # raised when the page and the messages must change together


class Event(msgspec.Struct, frozen=True):
    """A mark on the time line. number: counts up from 1. at: seconds since 1970. replica: its
    name; "" where there is one only."""

    number: int
    at: float
    kind: str
    replica: str
    text: str = ""


class ReplicaRow(msgspec.Struct, frozen=True, array_like=True):
    """A replica now. sample: its newest one, null where there is none."""

    id: int
    name: str
    state: str
    reason: str
    sample: msgspec.Raw | None


class Cursor(msgspec.Struct, frozen=True):
    """What a viewer has seen: the numbers of a sample and of an event. life: of the process."""

    life: str = ""
    sample: int = 0
    event: int = 0

    def __str__(self) -> str:
        return f"{self.life}.{self.sample}.{self.event}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """The cursor that a viewer sent; the beginning for anything else."""
        life, _, rest = text.partition(".")
        sample, _, event = rest.partition(".")
        if sample.isdecimal() and event.isdecimal() and len(rest) < 32:
            return cls(life, int(sample), int(event))
        return cls()


class Feed:
    """Makes the messages. life: differs between two processes. about: facts for the page's head."""

    def __init__(self, life: str, about: dict[str, Any], history: History) -> None:
        self.life, self.about, self._history = life, about, history

    def message(
        self, cursor: Cursor, events: list[Event], replicas: list[ReplicaRow]
    ) -> tuple[bytes, Cursor]:
        """The next event for a viewer, and what it has seen then. events: all that are kept."""
        first = cursor.life != self.life
        if first:
            cursor = Cursor(self.life)
        samples = self._history.since(cursor.sample)
        new = [event for event in events if event.number > cursor.event]
        body: dict[str, Any] = {"samples": json_list(samples), "events": new, "replicas": replicas}
        if first:
            body["about"] = {
                **self.about, "format": _FORMAT, "fields": FIELDS, "bounds": BOUNDS,
                "step_kinds": STEP_KINDS,
            }  # fmt: skip
        last = events[-1].number if events else 0
        seen = Cursor(self.life, self._history.number, max(last, cursor.event))
        name = b"all" if first else b"new"
        data = msgspec.json.encode(body)
        return b"event: %b\nid: %b\ndata: %b\n\n" % (name, str(seen).encode(), data), seen
