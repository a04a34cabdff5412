"""The live page of one server: a sample each second, an hour of them, and events of its engine."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import msgspec

from millrace.dashboard.history import History
from millrace.dashboard.sample import Sample
from millrace.dashboard.stream import Cursor, Event, Feed, ReplicaRow
from millrace.server.telemetry.samples import Sampler

_MAX_EVENTS = 200
_KEPT = 60  # newest samples that a gateway may ask for
_encode = msgspec.json.Encoder().encode


class LivePage:
    """sampler: makes the samples. state: of the engine, in a word, and why. about: facts for the
    page's head."""

    def __init__(
        self, sampler: Sampler, state: Callable[[], tuple[str, str]], about: dict[str, Any]
    ) -> None:
        self._sampler, self._state = sampler, state
        self._history = History()
        self._latest: deque[Sample] = deque(maxlen=_KEPT)
        self._events: deque[Event] = deque(maxlen=_MAX_EVENTS)
        self._known = ""
        self._feed = Feed(uuid4().hex[:12], about, self._history)
        self.viewers = 0

    async def run(self) -> None:
        """Take a sample each second, until cancelled."""
        due = int(time.time())
        while True:
            due = max(due, int(time.time())) + 1  # whole seconds, as other replicas have them
            await asyncio.sleep(due - time.time())
            self.sample()

    def sample(self) -> None:
        """Take a sample now, and note what changed."""
        sample = self._sampler.take()
        self._history.add(sample)
        self._latest.append(sample)
        state, reason = self._state()
        if state != self._known:
            number = self._events[-1].number + 1 if self._events else 1
            self._events.append(Event(number, time.time(), state, "", reason))
            self._known = state

    def message(self, cursor: Cursor) -> tuple[bytes, Cursor]:
        """The next server-sent event of a viewer that has seen so much."""
        state, reason = self._state()
        newest = msgspec.Raw(_encode(self._latest[-1])) if self._latest else None
        row = ReplicaRow(0, str(self._feed.about.get("name", "")), state, reason, newest)
        return self._feed.message(cursor, list(self._events), [row])

    def samples_since(self, at: int) -> list[Sample]:
        """The samples after that second, a minute of them at most; for a gateway."""
        return [sample for sample in self._latest if sample.at > at]
