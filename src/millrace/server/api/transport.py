"""The two ways in which an answer is sent: whole as JSON, or streamed as server-sent events.

A stream's status line is sent with its first piece, so that a request which the engine refuses
still gets a proper status. A later failure becomes an event of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from millrace.server.api.formatters import Formatter
from millrace.server.api.generation import Generation, Generations
from millrace.server.http.errors import ClientGoneError, as_api_error

OpenGenerations = Callable[[Receive], Generations]

_encode = msgspec.json.Encoder().encode

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # tells nginx to pass every chunk on at once
]


def json_response(body: msgspec.Struct | Mapping[str, Any]) -> Response:
    return Response(_encode(body), media_type="application/json")


def stream_response(events: Iterable[bytes]) -> Response:
    """A stream whose events are all known."""
    return Response(b"".join(events), headers={k.decode(): v.decode() for k, v in STREAM_HEADERS})


class FullResponse:
    """An ASGI application that answers once everything is generated."""

    def __init__(self, open_generations: OpenGenerations, formatter: Formatter) -> None:
        self._open = open_generations
        self._formatter = formatter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._open(receive) as generations:
                pieces = await generations.each(Generation.read_all)
                body = self._formatter.full_response(generations.all, pieces, generations.usage())
        except ClientGoneError:
            return
        await json_response(body)(scope, receive, send)


class StreamingResponse:
    """An ASGI application that sends each piece as it comes."""

    def __init__(self, open_generations: OpenGenerations, formatter: Formatter) -> None:
        self._open = open_generations
        self._formatter = formatter
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        try:
            async with self._open(receive) as generations:
                self._generations = generations
                await generations.each(self._stream)
                usage = generations.usage()
            await self._write(self._formatter.final_events(usage), more=False)
        except ClientGoneError:
            return
        except Exception as error:
            if not self._started:
                raise
            await self._write(self._formatter.error_events(as_api_error(error)), more=False)

    async def _stream(self, generation: Generation) -> None:
        first = True
        while not generation.done:
            piece = await generation.next()
            if not self._started:
                await self._start()
            usage = self._generations.usage() if self._formatter.needs_usage else None
            await self._write(self._formatter.piece_events(generation, piece, first, usage))
            first = False

    async def _start(self) -> None:
        self._started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})

    async def _write(self, events: Iterable[bytes], more: bool = True) -> None:
        """Send events at once. A client must not get half of one: each ends with a blank line."""
        data = b"".join(events)
        if data or not more:
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
