"""A connection for measuring: the clock is read first, and nothing is parsed while a stream runs.

While chunks arrive, a piece costs a clock, an append and a check of its last bytes. Only where a
chunked body may have ended, an HTTP parser looks whether it has. The bytes are parsed with their
times when the response has ended and its connection is free again (`RawResponse.response`). A
response that is not a chunked stream (an error body, a stream without framing) is parsed as it
arrives.
"""

from __future__ import annotations

import asyncio
import os
from time import perf_counter_ns
from typing import cast

import httptools

from millrace.common.http_client import Reading, Response, Target, ssl_context

_END = b"\r\n\r\n"  # ends every chunked body: that of its last chunk, or of its trailers
# The end of nearly all streams: a chunk with the last event, then the last chunk. After that event
# no answer goes on, so no parser need look; that the framing agrees is checked when it is parsed.
_USUAL_END = b"\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class _EndFinder:
    """Finds the end of a chunked body. It takes no body bytes, so that parsing costs little."""

    __slots__ = ("_fed", "_parser", "desynchronized", "ended")

    def __init__(self) -> None:
        self.ended = False
        self.desynchronized = (
            False  # what follows on this connection cannot be told from this response
        )
        self._fed = 0  # pieces
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)

    def look(self, pieces: list[tuple[int, bytes]]) -> bool:
        """Whether these pieces are a whole response; those of earlier calls are among them.

        Bytes that are not HTTP end it too: the parser of the response will say what is wrong.
        """
        first, self._fed = self._fed, len(pieces)
        assert self._parser is not None
        try:
            self._parser.feed_data(b"".join([piece for _, piece in pieces[first:]]))
        except httptools.HttpParserError:
            self.ended = self.desynchronized = True
        return self.ended

    def on_message_begin(self) -> None:
        self.desynchronized = self.ended

    def on_message_complete(self) -> None:
        assert self._parser is not None
        # After an interim answer (1xx) the real one follows.
        self.ended = self.ended or self._parser.get_status_code() >= 200

    def release(self) -> None:
        """Nothing more is parsed; the parser and this refer to each other."""
        self._parser = None


class RawResponse(Reading):
    """The pieces of one response, each with its time, and how far they have been parsed."""

    __slots__ = ("_fed", "pieces")

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[tuple[int, bytes]] = []
        self._fed = 0

    @property
    def begun(self) -> bool:
        """Whether any byte of an answer has arrived."""
        return bool(self.pieces)

    @property
    def error(self) -> str | None:
        """The failure, as far as it is known."""
        return self.got.error

    def parse(self) -> None:
        """Parse the pieces since the last call; an error of the parser becomes `error`."""
        first, self._fed = self._fed, len(self.pieces)
        try:
            for now, piece in self.pieces[first:]:
                self.feed(now, piece)
        except httptools.HttpParserError as error:
            self.end(f"the server answered something that is not HTTP/1.1 ({error})")

    def end(self, error: str | None) -> None:
        """Record that nothing more arrives. The first error is kept."""
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
        self._streaming = False  # while a chunked body arrives
        self._end: _EndFinder | None = None
        self._fd = -1  # none to be written to directly

    @property
    def open(self) -> bool:
        """Whether another request may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def busy(self) -> bool:
        """Whether a response is still awaited."""
        return self._waiter is not None

    @property
    def pieces(self) -> int:
        """Pieces of the awaited answer that have arrived."""
        return len(self._pieces)

    def send(self, request: bytes) -> asyncio.Future[RawResponse]:
        """Write one encoded request; the future resolves to the answer and never raises."""
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
        """Pass the request to the kernel now. The loop's transport would do so only after all else
        that is ready, long after the request's start was taken."""
        assert self._transport is not None
        written = 0
        if self._fd >= 0:
            try:
                written = os.write(self._fd, request)
            except OSError:  # the buffer is full, or the connection is gone: left to the transport
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
        if self._streaming and data[-4:] != _END and len(data) > 3:
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
        if self._waiter is None:  # bytes that belong to no request
            self.close()
        elif self._streaming:
            if self._ended():
                desynchronized = self._end is not None and self._end.desynchronized
                self._finish(None)  # parsed with its times later; the next request leaves first
                if desynchronized:
                    self.close()
        else:
            raw.parse()
            self._streaming = raw.chunked
            if raw.whole or raw.error:
                self._finish(None)
        if self._waiter is None and not raw.keep:
            self.close()

    def _ended(self) -> bool:
        """Whether the last piece ends a chunked body."""
        pieces = self._pieces
        tail = pieces[-1][1]
        before = len(pieces) - 2
        while len(tail) < len(_USUAL_END) and before >= 0:  # the end arrived in several pieces
            tail = pieces[before][1] + tail
            before -= 1
        if tail.endswith(_USUAL_END):
            return True
        if not tail.endswith(_END):
            return False
        if self._end is None:
            self._end = _EndFinder()
        return self._end.look(pieces)

    def _finish(self, error: str | None) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is None:
            return
        self._raw.end(error)
        if self._end is not None:
            self._end.release()
            self._end = None
        self._pieces, self._streaming = [], False  # later bytes are no part of it
        if not waiter.done():
            waiter.set_result(self._raw)


async def connect(target: Target) -> TimedConnection:
    """An open connection. Raises OSError when there is none to be had."""
    context = ssl_context(target.verify) if target.tls else None
    _, connection = await asyncio.get_running_loop().create_connection(
        TimedConnection, target.host, target.port, ssl=context
    )
    return connection
