"""What a viewer of the live page gets: first all that is known, then what each second brings.

Every message is a server-sent event with JSON. A viewer that comes back says the last id that it
has seen, and gets only what followed. Who sends them, and when, is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from millrace.dashboard.history import History, json_list
from millrace.dashboard.sample import BOUNDS, FIELDS, STEP_KINDS

MAX_VIEWERS = 32  # of one process; each holds a connection
CONTENT_TYPE = "text/event-stream; charset=utf-8"
_FORMAT = 2  # raised when the page and the messages must change together


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
    """What a viewer has seen: the numbers of a sample, of an event, and of a change of the
    replicas' rows. life: of the process."""

    life: str = ""
    sample: int = 0
    event: int = 0
    rows: int = 0

    def __str__(self) -> str:
        return f"{self.life}.{self.sample}.{self.event}.{self.rows}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """The cursor that a viewer sent; the beginning for anything else."""
        life, *numbers = text.split(".")
        if len(numbers) == 3 and all(n.isdecimal() and len(n) < 16 for n in numbers):
            return cls(life, *map(int, numbers))
        return cls()


class _Rows:
    """When each row changed last. A row whose sample is the same object has not changed."""

    def __init__(self) -> None:
        self.number = 0  # of the latest change
        self._rows: dict[int, tuple[ReplicaRow, int]] = {}
        self._ids: list[int] = []
        self._ids_changed = 0

    def update(self, rows: Sequence[ReplicaRow]) -> None:
        """Take the rows as they are now."""
        number, known = self.number + 1, self._rows
        self._rows = {
            row.id: (row, number) if (old := known.get(row.id)) is None or _differ(old[0], row)
            else old
            for row in rows
        }  # fmt: skip
        ids = [row.id for row in rows]
        if ids != self._ids:
            self._ids, self._ids_changed = ids, number
        if self._ids_changed == number or any(at == number for _, at in self._rows.values()):
            self.number = number

    def since(self, number: int) -> dict[str, Any]:
        """The rows that changed after a change, and the ids of all where these did."""
        found: dict[str, Any] = {
            "replicas": [row for row, changed in self._rows.values() if changed > number]
        }
        if self._ids_changed > number:
            found["ids"] = self._ids
        return found


def _differ(one: ReplicaRow, other: ReplicaRow) -> bool:
    return (
        one.sample is not other.sample
        or one.state != other.state
        or one.reason != other.reason
        or one.name != other.name
    )


class Feed:
    """Makes the messages. life: differs between two processes. about: facts for the page's head."""

    def __init__(self, life: str, about: dict[str, Any], history: History) -> None:
        self.life, self.about, self._history = life, about, history
        self._rows = _Rows()

    def message(
        self, cursor: Cursor, events: list[Event], replicas: list[ReplicaRow]
    ) -> tuple[bytes, Cursor]:
        """The next event for a viewer, and what it has seen then. events: all that are kept.
        replicas: all of them; those that the viewer knows as they are, are left out."""
        first = cursor.life != self.life
        if first:
            cursor = Cursor(self.life)
        samples = self._history.since(cursor.sample)
        new = [event for event in events if event.number > cursor.event]
        self._rows.update(replicas)
        body = {"samples": json_list(samples), "events": new, **self._rows.since(cursor.rows)}
        if first:
            body["about"] = {
                **self.about, "format": _FORMAT, "fields": FIELDS, "bounds": BOUNDS,
                "step_kinds": STEP_KINDS,
            }  # fmt: skip
        last = events[-1].number if events else 0
        seen = Cursor(self.life, self._history.number, max(last, cursor.event), self._rows.number)
        name = b"all" if first else b"new"
        data = msgspec.json.encode(body)
        return b"event: %b\nid: %b\ndata: %b\n\n" % (name, str(seen).encode(), data), seen
