"""A client's connection: requests are parsed, and answered one after another in their order."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from random import getrandbits
from typing import cast

import httptools
import msgspec

from millrace.common.api_errors import shutting_down
from millrace.common.tasks import describe
from millrace.dashboard.stream import MAX_VIEWERS
from millrace.gateway.http.bodies import RequestBodies
from millrace.gateway.http.message import (
    MAX_REQUEST_ID,
    Headers,
    LocalReply,
    Request,
    Via,
    api_error_reply,
    as_get,
    error_reply,
    header,
    next_part,
    stream_head,
)
from millrace.gateway.relay.exchange import Exchange
from millrace.gateway.relay.relay import Relay
from millrace.request_parser import Head, RequestParser

logger = logging.getLogger("millrace.gateway")

_PART_SECONDS = 1.0  # between two parts of a stream
_LINGER_SECONDS = 5.0  # for a client to read the last reply and to stop sending
_LARGE_BODY = 64 << 10  # bytes; a smaller body is read before its request is refused
_LEAST_RATE = 16 << 10  # bytes per second at which a request may take longer than client_timeout


class ClientConnection(asyncio.Protocol):
    """One connection; `paused` while the client takes no more bytes. via: its listener."""

    def __init__(self, relay: Relay, via: Via = "public") -> None:
        self._relay = relay
        self._via = via
        self._transport: asyncio.Transport | None = None
        self._parser = RequestParser(self, self._take_head)
        self._waiting: deque[Request | LocalReply] = deque()
        self._exchange: Exchange | LocalReplyTask | None = None
        self._refused = False
        self._awaits_continue = False
        self._large_body = min(_LARGE_BODY, relay.limits.max_body_bytes)
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._last_activity = self._message_began = self._loop.time()
        self._bodies = RequestBodies(relay.bodies)
        self._peer = "-"
        self.paused = False
        self._buffered_head = b""
        self._begin()

    def _begin(self) -> None:
        self._path = b""
        self._headers: Headers = []
        self._head_size = 0

    def _take_head(self) -> Head:
        head = self._path, self._headers
        self._begin()
        return head

    # --- asyncio.Protocol ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self._peer = peer[0] if isinstance(peer, tuple) else "-"
        self._relay.clients.add(self)
        self._relay.process_counters.add_gauge("clients", 1)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._last_activity = self._loop.time()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            message = f"this is not an HTTP/1.1 request ({error})"
            self._refuse(error_reply(400, message, close=True, code="invalid_http"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._relay.clients.discard(self)
        self._relay.process_counters.add_gauge("clients", -1)
        self._transport = None
        self._waiting.clear()
        if self._exchange is not None:
            self._exchange.cancel()
            self._exchange = None
        self._bodies.close()

    def pause_writing(self) -> None:
        self.paused = True
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        self.paused = False
        if self._exchange is not None:
            self._exchange.resume()

    # --- httptools callbacks -------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._message_began = self._loop.time()

    def on_url(self, url: bytes) -> None:
        self._path += url
        self._grow_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))
        self._grow_head(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        if self._parser.again:
            return
        announced, large, expects = 0, False, False
        for name, value in self._headers:  # one pass: it costs every request
            size = len(name)
            if size == 14 and name.lower() == b"content-length":
                announced = int(value) if value.isdigit() and len(value) < 20 else 0
                large = announced > self._large_body
            elif size == 17 and name.lower() == b"transfer-encoding":
                large = True
            elif size == 6 and name.lower() == b"expect":
                expects = value.lower() == b"100-continue"
        refusal = self._early_refusal(announced) if large or expects else None
        if refusal is not None:
            self._refuse(refusal)
        elif expects:
            self._awaits_continue = True
            self._continue()

    def _early_refusal(self, announced: int) -> LocalReply | None:
        """Why the body need not be read: it is too large, or there is no key. announced: its size,
        0 if it is not known."""
        refusal = self._relay.bodies.refusal(announced, 0)
        if refusal is None and self._via == "public":
            request = Request(b"", self._path, "1.1", self._headers, b"", False)
            if not self._relay.access.allows_api(request):
                refusal = api_error_reply(self._relay.access.refusal(request), close=True)
        return refusal

    def _continue(self) -> None:
        """Send 100 Continue if it is due, and no response is being sent or waited for."""
        if self._awaits_continue and self._exchange is None and not self._waiting:
            self._awaits_continue = False
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            refusal = self._bodies.take(body)
            if refusal is not None:
                self._refuse(refusal)

    def on_message_complete(self) -> None:
        if self._refused or self._parser.again:
            return
        limit = self._relay.limits.max_pipelined
        if len(self._waiting) >= limit:
            message = f"more than {limit} requests were sent ahead of their responses"
            self._refuse(error_reply(429, message, close=True))
            return
        self._awaits_continue = False
        given = header(self._headers, b"x-request-id")
        request = Request(
            method=self._parser.get_method(),
            path=self._path,
            version=self._parser.get_http_version(),
            headers=self._headers,
            body=self._bodies.finish(),
            keep_alive=self._parser.should_keep_alive(),
            id=given if 0 < len(given) <= MAX_REQUEST_ID else b"%032x" % getrandbits(128),
            peer=self._peer,
            via=self._via,
        )
        self._begin()
        self._waiting.append(request)
        self._serve_next()
        if self._waiting and self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()  # until the earlier requests have been answered

    def _grow_head(self, size: int) -> None:
        self._head_size += size
        if self._head_size > self._relay.limits.max_head_bytes:
            message = f"the head is larger than {self._relay.limits.max_head_bytes} bytes"
            self._refuse(error_reply(431, message, close=True))

    # --- answering -----------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send bytes to the client; they are dropped if it has gone."""
        if self._buffered_head:
            data, self._buffered_head = self._buffered_head + data, b""
        if self._transport is not None:
            self._transport.write(data)

    @property
    def writer(self) -> Callable[[bytes], None] | None:
        """The transport's own write, while no head is buffered; else None."""
        return (
            self._transport.write
            if self._transport is not None and not self._buffered_head
            else None
        )

    def buffer_head(self, data: bytes) -> None:
        """Send this head together with the next bytes."""
        self._buffered_head = data

    def drop_head(self) -> None:
        """Forget the head that `buffer_head` was given."""
        self._buffered_head = b""

    def answer(self, own: LocalReply, request: Request) -> None:
        """Send a local reply and go on to the next request."""
        own = own.in_shape_of(request.path)
        more = self._relay.access.cors_headers(request)
        if more:
            own = msgspec.structs.replace(own, headers=(*own.headers, *more))
        keep_alive = request.keep_alive and not own.close
        self._relay.process_counters.count_status(own.status)
        self.write(own.encode(request.id, keep_alive, head_only=request.method == b"HEAD"))
        self.finished(keep_alive)

    def finished(self, keep_alive: bool) -> None:
        """The current request has been answered: take the next one, or close."""
        self._exchange = None
        self._bodies.release_oldest()
        self._last_activity = self._loop.time()
        if (self._closing or not keep_alive) and self._transport is not None:
            self._transport.close()
        else:
            self._serve_next()
            self._continue()

    def close(self) -> None:
        """Drop the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def close_when_done(self) -> None:
        """Close after the current request has been answered; now if there is none."""
        self._closing = True
        if self._exchange is None and self._transport is not None:
            self._transport.close()

    def close_if_idle_since(self, moment: float) -> None:
        """Close if a request is awaited and nothing has come since then."""
        if self._exchange is not None or self._transport is None:
            return
        coming = self._bodies.size or self._head_size
        slow = coming and self._message_began + self._bodies.size / _LEAST_RATE < moment
        if coming and (slow or self._last_activity < moment):
            self._refuse(error_reply(408, "the request did not arrive in time", close=True))
        elif self._last_activity < moment:
            self._transport.close()

    def _serve_next(self) -> None:
        while self._exchange is None and self._waiting and self._transport is not None:
            request = self._waiting.popleft()
            if not self._waiting and not self._transport.is_closing():
                self._transport.resume_reading()
            if isinstance(request, LocalReply):  # a refusal, the last reply on this connection
                self._relay.process_counters.count_status(request.status)
                self.write(request.encode())
                self._linger()
            else:
                self._handle(request)

    def _handle(self, request: Request) -> None:
        relay = self._relay
        if relay.admin.handles(request):
            self._exchange = LocalReplyTask(relay, self, request)
        elif self._via != "public":
            message = "only /health, /metrics, /v1/models and /gateway are served here"
            self.answer(error_reply(404, message), request)
        elif not relay.access.allows_api(request):
            self.answer(api_error_reply(relay.access.refusal(request)), request)
        elif relay.closing:
            self.answer(api_error_reply(shutting_down(), close=True), request)
        else:
            relay.access.isolate(request)
            exchange = self._exchange = Exchange(relay, self, request)
            exchange.start()

    def _refuse(self, answer: LocalReply) -> None:
        """Reply so after the earlier requests have been answered, and parse nothing more."""
        if not self._refused:
            self._refused = True
            self._bodies.drop()
            self._waiting.append(answer)
            self._serve_next()

    def _linger(self) -> None:
        """Close once the client has read the last reply. Until then its bytes are read and
        dropped: a close with unread bytes would discard the reply on its way."""
        if self._transport is None:
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()
        self._loop.call_later(_LINGER_SECONDS, self.close)


class LocalReplyTask:
    """A local reply that is being made. It is short, so flow control does not apply; to a stream
    nothing is added while its client does not read."""

    def __init__(self, relay: Relay, client: ClientConnection, request: Request) -> None:
        self._client = client
        self._request = request
        self._paused = False
        self._task = asyncio.get_running_loop().create_task(self._make(relay))

    def cancel(self) -> None:
        """The client has gone."""
        self._task.cancel()

    def pause(self) -> None:
        """The client does not read."""
        self._paused = True

    def resume(self) -> None:
        """The client reads again."""
        self._paused = False

    async def _make(self, relay: Relay) -> None:
        try:
            own = await relay.admin.answer(as_get(self._request))
        except Exception as error:
            logger.error("a local request failed (%s)", describe(error))
            own = error_reply(500, "the gateway failed on this request; its log says more")
        if own.follow and self._request.method == b"HEAD":
            own = msgspec.structs.replace(own, body=b"", follow="")  # a stream has no length
        if own.follow and relay.viewers < MAX_VIEWERS:
            await self._stream(relay, own)
            return
        if own.follow:
            own = error_reply(503, f"{MAX_VIEWERS} viewers watch already", retry_after=60)
        self._client.answer(own, self._request)

    async def _stream(self, relay: Relay, part: LocalReply) -> None:
        """Send this part and those that follow, one each second, until the client or the gateway
        goes."""
        relay.viewers += 1
        try:
            relay.process_counters.count_status(part.status)
            self._client.write(stream_head(part, self._request.id) + part.body)
            while not relay.closing:
                await asyncio.sleep(_PART_SECONDS)
                if not self._paused:
                    part = await relay.admin.answer(next_part(self._request, part.follow))
                    if not part.follow:
                        break
                    self._client.write(part.body)
        finally:
            relay.viewers -= 1
        self._client.finished(keep_alive=False)
