"""A client's connection: requests are parsed and answered one after another, in their order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from random import getrandbits
from typing import cast

import httptools

from millrace.gateway.http.bodies import Bodies
from millrace.gateway.http.message import (
    MAX_REQUEST_ID,
    Answer,
    Headers,
    Request,
    error_answer,
    header,
)
from millrace.gateway.relay.exchange import Exchange
from millrace.gateway.relay.relay import Relay

_LEAST_RATE = 16 << 10  # bytes a second that a request must bring to take longer than others


class ClientConnection(asyncio.Protocol):
    """One connection; `paused` while the client takes no more bytes."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Request | Answer] = deque()
        self._exchange: Exchange | OwnAnswer | None = None
        self._refused = False
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._since = self._begun = self._loop.time()
        self._bodies = Bodies(relay.bodies)
        self._peer = "-"
        self.paused = False
        self._held = b""
        self._begin()

    def _begin(self) -> None:
        self._path = b""
        self._headers: Headers = []
        self._head_size = 0

    # --- asyncio.Protocol ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self._peer = peer[0] if isinstance(peer, tuple) else "-"
        self._relay.clients.add(self)
        self._relay.part.live("clients", 1)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._since = self._loop.time()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The request itself is whole; we stay with HTTP/1.1 and read on behind it.
            self._parser = httptools.HttpRequestParser(self)
            self.data_received(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            message = f"this is not an HTTP/1.1 request ({error})"
            self._refuse(error_answer(400, message, close=True))

    def connection_lost(self, exc: Exception | None) -> None:
        self._relay.clients.discard(self)
        self._relay.part.live("clients", -1)
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
        self._begun = self._loop.time()

    def on_url(self, url: bytes) -> None:
        self._path += url
        self._grow_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))
        self._grow_head(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        if header(self._headers, b"expect").lower() == b"100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            refusal = self._bodies.take(body)
            if refusal is not None:
                self._refuse(refusal)

    def on_message_complete(self) -> None:
        if self._refused:
            return
        given = header(self._headers, b"x-request-id")
        request = Request(
            method=self._parser.get_method(),
            path=self._path,
            version=self._parser.get_http_version(),
            headers=self._headers,
            body=self._bodies.end(),
            keep_alive=self._parser.should_keep_alive(),
            id=given if 0 < len(given) <= MAX_REQUEST_ID else b"%032x" % getrandbits(128),
            peer=self._peer,
        )
        self._begin()
        self._waiting.append(request)
        if len(self._waiting) > self._relay.limits.max_pipelined:
            self.close()
            return
        self._next()
        if self._waiting and self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()  # until those before it have been answered

    def _grow_head(self, size: int) -> None:
        self._head_size += size
        if self._head_size > self._relay.limits.max_head:
            message = f"the head is larger than {self._relay.limits.max_head} bytes"
            self._refuse(error_answer(431, message, close=True))

    # --- answering -----------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send bytes to the client, or drop them when it has gone."""
        if self._held:
            data, self._held = self._held + data, b""
        if self._transport is not None:
            self._transport.write(data)

    @property
    def writer(self) -> Callable[[bytes], None] | None:
        """What takes bytes straight to the client, as `write` does once nothing is held."""
        return self._transport.write if self._transport is not None and not self._held else None

    def hold(self, data: bytes) -> None:
        """Send these bytes together with the next ones."""
        self._held = data

    def answer(self, own: Answer, request: Request) -> None:
        """Send a whole answer of the gateway's own and go on."""
        keep_alive = request.keep_alive and not own.close
        self._relay.part.answered(own.status)
        self.write(own.encode(request.id, keep_alive))
        self.finished(keep_alive)

    def finished(self, keep_alive: bool) -> None:
        """The request under way has been answered: take the next, or close."""
        self._exchange = None
        self._bodies.answered()
        self._since = self._loop.time()
        if (self._closing or not keep_alive) and self._transport is not None:
            self._transport.close()
        else:
            self._next()

    def close(self) -> None:
        """Drop the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def close_when_done(self) -> None:
        """Close once the request under way has been answered; now if there is none."""
        self._closing = True
        if self._exchange is None and self._transport is not None:
            self._transport.close()

    def close_if_silent_since(self, moment: float) -> None:
        """Close if the client owes us a request and has sent nothing since then."""
        if self._exchange is not None or self._transport is None:
            return
        coming = self._bodies.size or self._head_size
        slow = coming and self._begun + self._bodies.size / _LEAST_RATE < moment
        if coming and (slow or self._since < moment):
            self._refuse(error_answer(408, "the request did not arrive in time", close=True))
        elif self._since < moment:
            self._transport.close()

    def _next(self) -> None:
        while self._exchange is None and self._waiting and self._transport is not None:
            request = self._waiting.popleft()
            if not self._waiting and not self._transport.is_closing():
                self._transport.resume_reading()
            if isinstance(request, Answer):  # a refusal, the last thing said here
                self._relay.part.answered(request.status)
                self.write(request.encode())
                # Read on for a moment: closing on unread bytes would take the answer back.
                self._loop.call_later(0.5, self._close_politely)
            else:
                self._handle(request)

    def _handle(self, request: Request) -> None:
        relay = self._relay
        if relay.admin.owns(request):
            self._exchange = OwnAnswer(relay, self, request)
        elif not relay.access.admits(request):
            message = "this API needs a key: send Authorization: Bearer KEY"
            self.answer(error_answer(401, message), request)
        elif relay.closing:
            stopping = error_answer(503, "the gateway is stopping", retry_after=1, close=True)
            self.answer(stopping, request)
        else:
            exchange = self._exchange = Exchange(relay, self, request)
            exchange.start()

    def _refuse(self, answer: Answer) -> None:
        """Answer so once those before have been answered, and read nothing more."""
        if not self._refused:
            self._refused = True
            self._bodies.drop()
            self._waiting.append(answer)
            self._next()

    def _close_politely(self) -> None:
        if self._transport is not None:
            self._transport.close()


class OwnAnswer:
    """An answer of the gateway's own in the making. It is short, so nothing holds it back."""

    def __init__(self, relay: Relay, client: ClientConnection, request: Request) -> None:
        self._client = client
        self._request = request
        self._task = asyncio.get_running_loop().create_task(self._make(relay))

    def cancel(self) -> None:
        """The client has gone."""
        self._task.cancel()

    def pause(self) -> None:
        """Nothing to hold back."""

    def resume(self) -> None:
        """Nothing was held back."""

    async def _make(self, relay: Relay) -> None:
        own = await relay.admin.answer(self._request)
        self._client.answer(own, self._request)
