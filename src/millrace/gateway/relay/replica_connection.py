"""A connection to a replica: one request at a time, kept open between requests.

It parses a response's head and finds its end; bodies are passed on as raw bytes. Only where an
exchange asks for it (`decode`) is the body taken out of its framing.
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

_STALE_SECONDS = 1.0  # after the request; a later close is not that of an idle connection
_BODILESS = frozenset((204, 304))


class ResponseHandler(Protocol):
    """Receives a response: the exchange that sent the request."""

    def head(self, head: ResponseHead, first: bytes) -> bool:
        """The response's head has come, and `first`, the start of its body. False: the request goes
        to another replica instead."""
        ...

    def body(self, data: bytes) -> None:
        """More of the body has come."""
        ...

    def fast_path(self) -> FastPath | None:
        """The fast path for the pieces to come, from between two events; None if there is none."""
        ...

    def complete(self, data: bytes, reusable: bool) -> None:
        """The response is complete. reusable: its connection can carry another request."""
        ...

    def failed(self, reason: str, *, stale: bool = False) -> None:
        """Nothing more will come. stale: an idle connection closed before a byte of the
        response."""
        ...


class ConnectionStore(Protocol):
    """Keeps idle connections (connection_pool.py)."""

    def keep(self, connection: ReplicaConnection) -> None:
        """Keep it for another request."""
        ...

    def drop(self, connection: ReplicaConnection) -> None:
        """It has closed."""
        ...


class _Decoding:
    """The parser's callbacks, with the one that copies bodies."""

    def __init__(self, connection: ReplicaConnection) -> None:
        self.on_message_begin = connection.on_message_begin
        self.on_status = connection.on_status
        self.on_header = connection.on_header
        self.on_headers_complete = connection.on_headers_complete
        self.on_message_complete = connection.on_message_complete
        self.on_body = connection.decoded.append


class ReplicaConnection(asyncio.Protocol):
    """One connection. decoded: body pieces of the current response, with `decode`."""

    def __init__(self, store: ConnectionStore, limits: GatewayLimits, replica: Replica) -> None:
        self.replica = replica
        self.decoded: list[bytes] = []
        self._store = store
        self._limits = limits
        self._transport: asyncio.Transport | None = None
        self._exchange: ResponseHandler | None = None
        self._reused = False
        self._sent_at = 0.0
        self._loop = asyncio.get_running_loop()
        self._paused = False
        self._parser = httptools.HttpResponseParser(self)
        self._begin(no_body=False, decode=False)

    def _begin(self, no_body: bool, decode: bool) -> None:
        self._no_body = no_body
        self._decode = decode
        self._status = 0
        self._head_buffer: list[bytes] = []
        self._head_size = 0
        self._reason = b""
        self._headers: Headers = []
        self._head_complete = False
        self._head_forwarded = False
        self._complete = False
        self._extra_data = False
        self._keep_alive = False
        self._buffer_whole = False
        self._at_chunk_boundary = False
        self._fast_path: FastPath | None = None

    @property
    def open(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, exchange: ResponseHandler, data: bytes, *, no_body: bool, decode: bool) -> None:
        """Write a request; its response goes to the exchange. no_body: the response has none."""
        assert self._exchange is None
        self._exchange = exchange
        self._begin(no_body, decode)
        if decode:
            self.decoded.clear()
        self._parser = httptools.HttpResponseParser(_Decoding(self) if decode else self)
        if self._transport is None or self._transport.is_closing():
            self._fail("the connection was closed")
        else:
            self._sent_at = self._loop.time()
            self._transport.write(data)

    def release(self, reusable: bool) -> None:
        """The exchange is done: keep the connection for another request, or close it."""
        self._exchange = self._fast_path = None
        self._reused = True
        if reusable and self.open:
            self.resume()
            self._store.keep(self)
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
        if self._fast_path is None or not self._fast_path.try_forward(data):
            self._parse(data)

    def _parse(self, data: bytes) -> None:
        self._fast_path = None
        exchange = self._exchange
        if exchange is None:
            self.close()  # no request was sent
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"answered something that is not HTTP/1.1 ({error})")
            return
        if self._extra_data:
            self._fail("sent more than its response")
        elif self._head_forwarded:
            self._forward_body(exchange, data)
        else:
            self._head_buffer.append(data)
            self._head_size += len(data)
            if self._head_complete:
                self._forward_head(exchange, ended=self._complete)
            elif self._head_size > self._limits.max_head_bytes:
                self._fail("answered with a head that is too large")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._exchange is None:
            self._store.drop(self)
        elif self._head_complete and not self._delimited and exc is None:
            if self._head_forwarded:
                self._exchange.complete(b"", reusable=False)
            else:
                self._forward_head(self._exchange, ended=True)
        else:
            self._fail("closed the connection before its response was complete")

    # --- httptools callbacks; without on_body, so bodies are not copied -------------------------

    def on_chunk_header(self) -> None:
        self._at_chunk_boundary = False

    def on_chunk_complete(self) -> None:
        self._at_chunk_boundary = True

    def on_message_begin(self) -> None:
        self._extra_data = self._complete

    def on_status(self, status: bytes) -> None:
        self._reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_complete:  # later ones are trailers, which pass with the body
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._head_complete = self._status >= 200
        self._keep_alive = self._parser.should_keep_alive()
        if self._head_complete:
            length = header(self._headers, b"content-length")
            self._buffer_whole = length.isdigit() and int(length) <= self._limits.max_kept_bytes

    def on_message_complete(self) -> None:
        if self._status >= 200:
            self._complete = True
        else:  # an interim response (1xx) is not passed on; the final one follows
            self._head_buffer = [b"".join(self._head_buffer)]
            self._headers, self._reason = [], b""

    # --- passing on ----------------------------------------------------------------------------

    @property
    def _bodiless(self) -> bool:
        return self._no_body or self._status in _BODILESS

    @property
    def _delimited(self) -> bool:
        """Whether the response's end is marked by a length, by chunks, or by having no body."""
        names = {name.lower() for name, _ in self._headers}
        return self._bodiless or b"content-length" in names or b"transfer-encoding" in names

    def _forward_body(self, exchange: ResponseHandler, data: bytes) -> None:
        if self._decode:
            data = b"".join(self.decoded)
            self.decoded.clear()
        if self._complete:
            exchange.complete(data, self._keep_alive)
        else:
            exchange.body(data)
            # Outside a chunk and after a line end that began no chunk: so between two chunks.
            if self._at_chunk_boundary and data.endswith(EVENT_END) and self._exchange is exchange:
                self._fast_path = exchange.fast_path()

    def _forward_head(self, exchange: ResponseHandler, ended: bool) -> None:
        """Forward the head with the body's first bytes, and a response of known length when it is
        complete. Servers send heads before the first token; until bytes are forwarded another
        replica can take over."""
        ended = ended or self._bodiless
        if self._buffer_whole and not ended:
            return
        rest = self._received_body()
        if not rest and not ended:
            return
        self._head_buffer, self._head_forwarded = [], True
        chunked = header(self._headers, b"transfer-encoding").lower() == b"chunked"
        head = ResponseHead(self._status, self._reason, self._headers, self._delimited, chunked)
        if not exchange.head(head, rest):
            return
        if not ended or self._decode:
            self._forward_body(exchange, rest)
        else:
            # The parser waits for the body that a HEAD's length announces, so it is not reused.
            exchange.complete(rest, self._keep_alive and self._complete)

    def _received_body(self) -> bytes:
        """The body bytes behind the head; interim heads (1xx) come before it."""
        held = b"".join(self._head_buffer)
        while True:
            head, _, rest = held.partition(b"\r\n\r\n")
            if not head.lstrip().startswith((b"HTTP/1.1 1", b"HTTP/1.0 1")):
                return rest
            held = rest

    def _fail(self, reason: str) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        silent = self._reused and not self._head_buffer and not self._head_forwarded
        # A replica that closes an idle connection does so before it can know of the request.
        silent = silent and self._loop.time() - self._sent_at < _STALE_SECONDS
        if silent and self._transport is None:
            self._exchange = None
            exchange.failed(reason, stale=True)
        else:
            exchange.failed(reason)
