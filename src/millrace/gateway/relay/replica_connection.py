"""A connection to a replica: one request at a time, kept open between them.

It reads a response's head and finds its end, and looks at nothing else: bodies pass as the bytes
they are. Only where an exchange asks for it (`decode`) are bodies taken out of their framing.
"""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

import httptools

from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.http.message import Headers, ResponseHead, header
from millrace.gateway.relay.fast_path import FastPath
from millrace.gateway.resume.journal import EVENT_END
from millrace.gateway.routing.replicas import Replica

_BODILESS = frozenset((204, 304))


class ResponseHandler(Protocol):
    """Who a response goes to: the exchange that has asked."""

    def head(self, head: ResponseHead, first: bytes) -> bool:
        """The response's head has come, and `first`, how its body begins. False: the request goes
        to another replica instead."""
        ...

    def body(self, data: bytes) -> None:
        """More of the body has come."""
        ...

    def fast_path(self) -> FastPath | None:
        """The short way for the pieces to come, from between two events. None: there is none."""
        ...

    def complete(self, data: bytes, reusable: bool) -> None:
        """The response is whole with these bytes. reusable: its connection can carry another."""
        ...

    def failed(self, reason: str, *, stale: bool = False) -> None:
        """There will be no more. stale: on a connection that had been idle, without a byte."""
        ...


class ConnectionStore(Protocol):
    """Where connections without a request wait (connection_pool.py)."""

    def keep(self, side: ReplicaConnection) -> None:
        """Keep it for another request."""
        ...

    def drop(self, side: ReplicaConnection) -> None:
        """It has closed."""
        ...


class _Decoding:
    """A parser's callbacks with the one that copies bodies."""

    def __init__(self, side: ReplicaConnection) -> None:
        self.on_message_begin = side.on_message_begin
        self.on_status = side.on_status
        self.on_header = side.on_header
        self.on_headers_complete = side.on_headers_complete
        self.on_message_complete = side.on_message_complete
        self.on_body = side.decoded.append


class ReplicaConnection(asyncio.Protocol):
    """One connection. decoded: body pieces of the current response, if they were asked for."""

    def __init__(self, shelf: ConnectionStore, limits: GatewayLimits, replica: Replica) -> None:
        self.replica = replica
        self.decoded: list[bytes] = []
        self._shelf = shelf
        self._limits = limits
        self._transport: asyncio.Transport | None = None
        self._exchange: ResponseHandler | None = None
        self._used = False
        self._paused = False
        self._parser = httptools.HttpResponseParser(self)
        self._begin(headless=False, decode=False)

    def _begin(self, headless: bool, decode: bool) -> None:
        self._headless = headless
        self._decode = decode
        self._status = 0
        self._held: list[bytes] = []
        self._held_size = 0
        self._reason = b""
        self._headers: Headers = []
        self._head_whole = False
        self._head_passed = False
        self._whole = False
        self._surplus = False
        self._keep = False
        self._hold_whole = False
        self._between = False
        self._fast_path: FastPath | None = None

    @property
    def open(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, exchange: ResponseHandler, data: bytes, *, headless: bool, decode: bool) -> None:
        """Write a request; its response goes to the exchange. headless: it has no body."""
        assert self._exchange is None
        self._exchange = exchange
        self._begin(headless, decode)
        if decode:
            self.decoded.clear()
        self._parser = httptools.HttpResponseParser(_Decoding(self) if decode else self)
        if self._transport is None or self._transport.is_closing():
            self._fail("the connection was closed")
        else:
            self._transport.write(data)

    def release(self, reusable: bool) -> None:
        """The exchange lets go: keep the connection for another request, or close it."""
        self._exchange = self._fast_path = None
        self._used = True
        if reusable and self.open:
            self.resume()
            self._shelf.keep(self)
        else:
            self.close()

    def close(self) -> None:
        """Drop the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Read no more from the replica."""
        if self._transport is not None and self.open and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read from the replica again."""
        if self._transport is not None and self.open and self._paused:
            self._paused = False
            self._transport.resume_reading()

    # --- asyncio.Protocol ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Both asyncio and uvloop set TCP_NODELAY on what they open and accept.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._fast_path is None or not self._fast_path.take(data):
            self._take_the_long_way(data)

    def _take_the_long_way(self, data: bytes) -> None:
        self._fast_path = None
        exchange = self._exchange
        if exchange is None:
            self.close()  # nothing was asked
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"answered something that is not HTTP/1.1 ({error})")
            return
        if self._surplus:
            self._fail("sent more than its response")
        elif self._head_passed:
            self._pass(exchange, data)
        else:
            self._held.append(data)
            self._held_size += len(data)
            if self._head_whole:
                self._pass_head(exchange, ended=self._whole)
            elif self._held_size > self._limits.max_head:
                self._fail("answered with a head that is too large")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._exchange is None:
            self._shelf.drop(self)
        elif self._head_whole and not self._delimited and exc is None:
            if self._head_passed:
                self._exchange.complete(b"", reusable=False)
            else:
                self._pass_head(self._exchange, ended=True)
        else:
            self._fail("closed the connection before its response was complete")

    # --- httptools callbacks; without on_body, so bodies are not copied -------------------------

    def on_chunk_header(self) -> None:
        self._between = False

    def on_chunk_complete(self) -> None:
        self._between = True

    def on_message_begin(self) -> None:
        self._surplus = self._whole

    def on_status(self, status: bytes) -> None:
        self._reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_whole:  # afterwards they are trailers, which pass with the body
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._head_whole = self._status >= 200
        self._keep = self._parser.should_keep_alive()
        if self._head_whole:
            length = header(self._headers, b"content-length")
            self._hold_whole = length.isdigit() and int(length) <= self._limits.max_kept

    def on_message_complete(self) -> None:
        if self._status >= 200:
            self._whole = True
        else:  # an interim response (1xx): not passed on, the real one follows
            self._held = [b"".join(self._held)]
            self._headers, self._reason = [], b""

    # --- passing on ----------------------------------------------------------------------------

    @property
    def _bodiless(self) -> bool:
        return self._headless or self._status in _BODILESS

    @property
    def _delimited(self) -> bool:
        """Whether the response's end is marked by a length, by chunks, or by having no body."""
        names = {name.lower() for name, _ in self._headers}
        return self._bodiless or b"content-length" in names or b"transfer-encoding" in names

    def _pass(self, exchange: ResponseHandler, data: bytes) -> None:
        if self._decode:
            data = b"".join(self.decoded)
            self.decoded.clear()
        if self._whole:
            exchange.complete(data, self._keep)
        else:
            exchange.body(data)
            # Outside a chunk, behind a line's end that did not begin one: so between two chunks.
            if self._between and data.endswith(EVENT_END) and self._exchange is exchange:
                self._fast_path = exchange.fast_path()

    def _pass_head(self, exchange: ResponseHandler, ended: bool) -> None:
        """Pass the head on together with the body's first bytes. Servers send heads before they
        have a token, and an answer of known length passes as a whole: until then another replica
        can still take over."""
        ended = ended or self._bodiless
        if self._hold_whole and not ended:
            return
        rest = self._body_so_far()
        if not rest and not ended:
            return
        self._held, self._head_passed = [], True
        chunked = header(self._headers, b"transfer-encoding").lower() == b"chunked"
        head = ResponseHead(self._status, self._reason, self._headers, self._delimited, chunked)
        if not exchange.head(head, rest):
            return
        if not ended or self._decode:
            self._pass(exchange, rest)
        else:
            # The parser waits for the body that a HEAD's length announces: no reuse then.
            exchange.complete(rest, self._keep and self._whole)

    def _body_so_far(self) -> bytes:
        """What came behind the head. Interim heads (1xx) stand before it."""
        held = b"".join(self._held)
        while True:
            head, _, rest = held.partition(b"\r\n\r\n")
            if not head.lstrip().startswith((b"HTTP/1.1 1", b"HTTP/1.0 1")):
                return rest
            held = rest

    def _fail(self, reason: str) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        silent = self._used and not self._held and not self._head_passed
        if silent and self._transport is None:
            self._exchange = None
            exchange.failed(reason, stale=True)
        else:
            exchange.failed(reason)
