"""A connection for measuring: the clock is read first, and nothing is parsed while a stream runs.

While chunks arrive, a piece costs a clock, an append and a check of its last bytes. The bytes are
parsed when the response has ended and its connection is free again (`RawResponse.response`). A
response that is not a chunked stream (an error body, a stream without framing) is parsed as it
arrives.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from time import perf_counter_ns
from typing import cast

import httptools

from millrace.common.http_client import Reading, Response, Target

_LAST = b"0\r\n\r\n"  # the chunk that ends a chunked body
_END = b"[DONE]\n\n\r\n" + _LAST
_SHORT = len(_LAST)  # a piece no longer than this may be the torn end of a body


class RawResponse(Reading):
    """The pieces of one response, each with its time, and how far they have been parsed."""

    __slots__ = ("_fed", "pieces")

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[tuple[int, bytes]] = []
        self._fed = 0

    @property
    def begun(self) -> bool:
        """Whether any byte of an answer has come."""
        return bool(self.pieces)

    @property
    def error(self) -> str | None:
        """What broke, as far as it is known."""
        return self.got.error

    def parse(self) -> None:
        """Parse the pieces that came since the last call; what is not HTTP becomes the error."""
        first, self._fed = self._fed, len(self.pieces)
        try:
            for now, piece in self.pieces[first:]:
                self.feed(now, piece)
        except httptools.HttpParserError as error:
            self.end(f"the server answered something that is not HTTP/1.1 ({error})")

    def end(self, error: str | None) -> None:
        """Note that nothing more comes. The first error is kept."""
        self.got.error = self.got.error or error
        self.got.end_ns = self.pieces[-1][0] if self.pieces else perf_counter_ns()

    def response(self) -> Response:
        """The parsed response; its pieces are those of the body."""
        self.parse()
        self.release()
        if not self.whole and self.got.error is None:
            self.got.error = "the framing of the response does not match its end"
        return self.got


class TimedConnection(asyncio.Protocol):
    """A connection that carries one request at a time and is kept open between them."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[RawResponse] | None = None
        self._raw = RawResponse()
        self._pieces = self._raw.pieces
        self._streaming = False
        self._fd = -1  # none to be written to directly

    @property
    def open(self) -> bool:
        """Whether another request may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def busy(self) -> bool:
        """Whether a response is still awaited."""
        return self._waiter is not None

    def send(self, request: bytes) -> asyncio.Future[RawResponse]:
        """Write one encoded request; the future resolves to what came back and never raises."""
        assert self._waiter is None, "one request at a time"
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        self._raw = RawResponse()
        self._pieces, self._streaming = self._raw.pieces, False
        if self._transport is None or self._transport.is_closing():
            self._finish("the connection was closed")
        else:
            self._write(request)
        return waiter

    def _write(self, request: bytes) -> None:
        """Hand the request to the kernel now: the loop's transport would do so only when it has
        gone through everything else that is ready, long after the request's start was noted."""
        assert self._transport is not None
        written = 0
        if self._fd >= 0:
            try:
                written = os.write(self._fd, request)
            except OSError:  # the buffer is full, or the connection is gone: the transport knows
                written = 0
        if written < len(request):
            self._transport.write(request[written:])

    def close(self) -> None:
        """Drop the connection; a response under way ends with an error."""
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if transport.get_extra_info("ssl_object") is None:
            self._fd = transport.get_extra_info("socket").fileno()

    def data_received(self, data: bytes) -> None:
        self._pieces.append((perf_counter_ns(), data))
        if self._streaming and data[-5:] != _LAST and len(data) > _SHORT:
            return
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiter is None:
            return
        raw = self._raw
        raw.parse()
        if raw.open_ended and exc is None:
            raw.whole = True
            self._finish(None)
        elif raw.begun:
            self._finish("the server closed the connection before the response was complete")
        else:
            self._finish("the server closed the connection without an answer")

    def _look(self) -> None:
        """See whether the response is whole."""
        raw = self._raw
        if self._waiter is None:  # bytes that nobody asked for
            self.close()
        elif self._streaming and self._ends_like_a_stream():
            self._finish(None)  # parsed later; the next request leaves first
        else:
            raw.parse()
            self._streaming = raw.chunked
            if raw.whole or raw.error:
                self._finish(None)
        if self._waiter is None and not raw.keep:
            self.close()

    def _ends_like_a_stream(self) -> bool:
        tail = self._pieces[-1][1]
        if len(tail) < len(_END):
            tail = self._pieces[-2][1] + tail
        return tail.endswith(_END)

    def _finish(self, error: str | None) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is None:
            return
        self._raw.end(error)
        self._pieces, self._streaming = [], False  # what comes now is no part of it
        if not waiter.done():
            waiter.set_result(self._raw)


async def connect(target: Target) -> TimedConnection:
    """An open connection. Raises OSError when there is none to be had."""
    context = ssl.create_default_context() if target.tls else None
    _, connection = await asyncio.get_running_loop().create_connection(
        TimedConnection, target.host, target.port, ssl=context
    )
    return connection
