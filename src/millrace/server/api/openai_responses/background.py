"""A response that is made in the background: its run, and its events for whoever reads them.

The run goes on when no client is there. Its events are numbered from 0; the last ones are kept, as
many as there is room for, and a reader begins anywhere among them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import msgspec
from starlette.types import Receive, Scope, Send

from millrace.errors import RequestError
from millrace.server.api.generation import Generations
from millrace.server.api.openai_responses.formatter import ResponseFormatter
from millrace.server.api.openai_responses.response_body import ResponseBody
from millrace.server.api.transport import STREAM_HEADERS
from millrace.server.http.errors import as_api_error

MAX_LOG_BYTES = 8 << 20  # of one run's events


class BackgroundRun:
    """One run. open_generations: of its only output. keeps_events: they can be read, also after the
    end. on_change: called after each change."""

    def __init__(
        self,
        open_generations: Callable[[], Generations],
        formatter: ResponseFormatter,
        *,
        keeps_events: bool,
    ) -> None:
        self._open = open_generations
        self._formatter = formatter
        self.keeps_events = keeps_events
        self.on_change: Callable[[], None] = lambda: None
        self.ended = False
        self.first = 0  # the number of the first event that is kept
        self.log_size = 0
        self._events: list[bytes] = []
        self._changed = asyncio.Event()
        self._cancelled = False
        self._emit(formatter.queued_events())

    def start(self) -> None:
        """Begin. Raises what the opening raises, and nothing runs then."""
        self._generations = self._open()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def snapshot(self) -> ResponseBody:
        """The answer so far."""
        return self._formatter.snapshot()

    async def cancel(self) -> None:
        """End the run; returns once its answer is settled."""
        self._cancelled = True
        self._task.cancel()
        await asyncio.wait([self._task])

    def shorten_log(self, size: int) -> None:
        """Drop so many bytes of the oldest events, or all."""
        while self._events and size > 0:
            dropped = len(self._events.pop(0))
            self.first += 1
            self.log_size -= dropped
            size -= dropped

    def check_start(self, number: int) -> None:
        """Raise RequestError unless events from this number on can be read."""
        if not self.keeps_events:
            raise RequestError(
                "this response has no stream to read: it was not created with both background and "
                "stream true; leave out stream",
                param="stream",
            )
        if number < self.first:
            raise RequestError(
                f"the events before number {self.first} are no longer kept; read on with "
                f"starting_after={self.first - 1}, or leave out stream",
                param="starting_after",
            )

    async def events_from(self, number: int) -> tuple[bytes, int | None]:
        """(all events from this number on, the next number; None: nothing follows). Waits until
        there is one. Ends with an error event if the next one is no longer kept."""
        while True:
            changed = self._changed
            if number < self.first:
                return _lost_event(number), None
            found = self._events[number - self.first :]
            if self.ended:
                return b"".join(found), None
            if found:
                return b"".join(found), number + len(found)
            await changed.wait()

    async def _run(self) -> None:
        try:
            async with self._generations as generations:
                (generation,) = generations.all
                first = True
                while not generation.done:
                    piece = await generation.next()
                    self._emit(self._formatter.piece_events(generation, piece, first, None))
                    first = False
                usage = generations.usage()
            self._emit(self._formatter.final_events(usage), last=True)
        except asyncio.CancelledError:
            self._emit(self._formatter.cancel_events(self._generations.usage()), last=True)
            if not self._cancelled:
                raise
        except Exception as error:
            self._emit(self._formatter.error_events(as_api_error(error)), last=True)

    def _emit(self, events: Iterable[bytes], last: bool = False) -> None:
        for event in events:
            if not self.keeps_events:
                continue
            self._events.append(event)
            self.log_size += len(event)
        self.shorten_log(self.log_size - MAX_LOG_BYTES)
        self.ended = last
        self._changed.set()
        self._changed = asyncio.Event()
        self.on_change()


class EventStream:
    """An ASGI application that sends a run's events from a number on. It may end before the run."""

    def __init__(self, run: BackgroundRun, start: int) -> None:
        self._run = run
        self._next = start

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            while not gone.done():
                reading = asyncio.ensure_future(self._run.events_from(self._next))
                await asyncio.wait([reading, gone], return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    reading.cancel()
                    return
                data, following = reading.result()
                more = following is not None
                await send({"type": "http.response.body", "body": data, "more_body": more})
                if following is None:
                    return
                self._next = following
        finally:
            gone.cancel()


def _lost_event(number: int) -> bytes:
    """The end of a stream whose reader was too slow."""
    body = {
        "type": "error",
        "sequence_number": number,
        "code": "events_dropped",
        "message": "this stream was read too slowly, and its next events are no longer kept; "
        "retrieve the response without stream",
        "param": None,
    }
    return b"event: error\ndata: %b\n\n" % msgspec.json.encode(body)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
