"""The relay: requests parsed and given to a replica, responses passed on as the bytes they are.

Three parties. `ClientSide` is a client's connection: it parses requests and answers them in
order. `ReplicaSide` is a connection to a replica, kept open between requests: it reads a
response's head and finds its end, and looks at nothing else. An `Exchange` joins the two for one
request: it picks, retries before the first byte, passes bytes, holds back pressure. What they
share is a `Relay`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter, deque
from collections.abc import Callable
from typing import cast

import httptools
import msgspec

from millrace.gateway.message import (
    Answer,
    Headers,
    Request,
    error_answer,
    request_bytes,
    response_head,
)
from millrace.gateway.picker import Picker
from millrace.gateway.replicas import Replica, ReplicaSet

_BODILESS = frozenset((204, 304))


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """max_in_flight: requests at once, more get 429. timeout: seconds in which a replica must
    bring its first byte, and each next one. Sizes in bytes."""

    max_in_flight: int = 16384
    max_body: int = 64 << 20
    max_head: int = 64 << 10
    max_pipelined: int = 16
    max_idle: int = 1024
    connect_timeout: float = 5.0
    timeout: float = 600.0


class Relay:
    """What all connections share: replicas, picker, limits, idle connections, counters.

    local: answers the gateway's own paths, and None for what is to be relayed.
    """

    def __init__(
        self,
        replicas: ReplicaSet,
        picker: Picker,
        limits: Limits,
        local: Callable[[Request], Answer | None],
    ) -> None:
        self.replicas = replicas
        self.picker = picker
        self.limits = limits
        self.local = local
        self.in_flight = 0
        self.retries = 0
        self.disconnects = 0
        self.cut_off = 0
        self.answered: Counter[int] = Counter()
        self.clients: set[ClientSide] = set()
        encrypted = any(replica.target.tls for replica in replicas.all)
        self.tls = ssl.create_default_context() if encrypted else None
        self._idle: dict[Replica, list[ReplicaSide]] = {r: [] for r in replicas.all}

    def take_idle(self, replica: Replica) -> ReplicaSide | None:
        """An open connection to the replica, the most recently used first."""
        idle = self._idle[replica]
        while idle:
            side = idle.pop()
            if side.open:
                return side
        return None

    def keep_idle(self, side: ReplicaSide) -> None:
        """Keep a connection for the next request to its replica."""
        idle = self._idle[side.replica]
        if len(idle) < self.limits.max_idle:
            idle.append(side)
        else:
            side.close()

    def drop_idle(self, side: ReplicaSide) -> None:
        """Forget a connection that has closed."""
        idle = self._idle[side.replica]
        if side in idle:
            idle.remove(side)

    def close(self) -> None:
        """Drop every connection, those with a request under way too."""
        for client in list(self.clients):
            client.close()
        for idle in self._idle.values():
            for side in list(idle):
                side.close()


class ClientSide(asyncio.Protocol):
    """A client's connection. Requests are answered one after another, in their order."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Request | Answer] = deque()
        self._exchange: Exchange | None = None
        self._refused = False
        self.paused = False
        self._begin()

    def _begin(self) -> None:
        self._path = b""
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._body_size = 0
        self._head_size = 0

    # --- asyncio.Protocol ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Both asyncio and uvloop set TCP_NODELAY on what they accept and open.
        self._transport = cast(asyncio.Transport, transport)
        self._relay.clients.add(self)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The request itself is whole; we stay with HTTP/1.1 and read on behind it.
            self._parser = httptools.HttpRequestParser(self)
            self.data_received(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if not self._refused:
                self._refuse(400, f"this is not an HTTP/1.1 request ({error})")

    def connection_lost(self, exc: Exception | None) -> None:
        self._relay.clients.discard(self)
        self._transport = None
        self._waiting.clear()
        if self._exchange is not None:
            self._relay.disconnects += 1
            self._exchange.cancel()
            self._exchange = None

    def pause_writing(self) -> None:
        self.paused = True
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        self.paused = False
        if self._exchange is not None:
            self._exchange.resume()

    # --- httptools callbacks -------------------------------------------------------------------

    def on_url(self, url: bytes) -> None:
        self._path += url
        self._grow_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))
        self._grow_head(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        if any(k.lower() == b"expect" and v.lower() == b"100-continue" for k, v in self._headers):
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_size += len(body)
        if self._body_size > self._relay.limits.max_body:
            self._refuse(413, f"the body is larger than {self._relay.limits.max_body} bytes")
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._refused:
            return
        request = Request(
            method=self._parser.get_method(),
            path=self._path,
            version=self._parser.get_http_version(),
            headers=self._headers,
            body=b"".join(self._body),
            keep_alive=self._parser.should_keep_alive(),
        )
        self._begin()
        self._waiting.append(request)
        if len(self._waiting) > self._relay.limits.max_pipelined:
            self.close()
        else:
            self._next()

    def _grow_head(self, size: int) -> None:
        self._head_size += size
        if self._head_size > self._relay.limits.max_head:
            self._refuse(431, f"the head is larger than {self._relay.limits.max_head} bytes")

    # --- answering -----------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send bytes to the client, or drop them when it has gone."""
        if self._transport is not None:
            self._transport.write(data)

    def answer(self, own: Answer, keep_alive: bool) -> None:
        """Send a whole answer of the gateway's own and go on."""
        self._relay.answered[own.status] += 1
        self.write(own.data)
        self.finished(keep_alive)

    def finished(self, keep_alive: bool) -> None:
        """The request under way has been answered: take the next, or close."""
        self._exchange = None
        if not keep_alive and self._transport is not None:
            self._transport.close()
        else:
            self._next()

    def close(self) -> None:
        """Drop the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _next(self) -> None:
        while self._exchange is None and self._waiting and self._transport is not None:
            request = self._waiting.popleft()
            if isinstance(request, Answer):  # a refusal, the last thing said here
                self._relay.answered[request.status] += 1
                self.write(request.data)
                # Read on for a moment: closing on unread bytes would take the answer back.
                asyncio.get_running_loop().call_later(0.5, self._close_politely)
            else:
                self._handle(request)

    def _handle(self, request: Request) -> None:
        relay = self._relay
        local = relay.local(request)
        if local is not None:
            self.answer(local, request.keep_alive)
        elif relay.in_flight >= relay.limits.max_in_flight:
            message = f"{relay.in_flight} requests are in flight, as many as may be; try again"
            self.answer(error_answer(429, message, retry_after=1), request.keep_alive)
        else:
            self._exchange = Exchange(relay, self, request)
            self._exchange.start()

    def _refuse(self, status: int, message: str) -> None:
        if not self._refused:
            self._refused = True
            self._waiting.append(error_answer(status, message, close=True))
            self._next()

    def _close_politely(self) -> None:
        if self._transport is not None:
            self._transport.close()


class Exchange:
    """One request on its way through: from the pick to the response's last byte.

    Until the first byte has gone to the client, a failure moves the request to another replica.
    Afterwards the client's connection is cut, so that it cannot take a part for the whole.
    """

    def __init__(self, relay: Relay, client: ClientSide, request: Request) -> None:
        self._relay = relay
        self._client = client
        self._request = request
        self._tried: list[Replica] = []
        self._replica: Replica | None = None
        self._upstream: ReplicaSide | None = None
        self._opening: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._last_byte = self._loop.time()
        self._status = 0
        self._keep_alive = False
        self._delimited = True
        self._last_failure = ""

    def start(self) -> None:
        """Pick a replica and send the request."""
        self._relay.in_flight += 1
        self._timer = self._loop.call_later(self._relay.limits.timeout, self._look_at_clock)
        self._attempt()

    def cancel(self) -> None:
        """The client has gone: the replica learns it by its connection closing."""
        self._end(reusable=False)

    def pause(self) -> None:
        """The client takes no more for now."""
        if self._upstream is not None:
            self._upstream.pause()

    def resume(self) -> None:
        """The client takes bytes again."""
        self._last_byte = self._loop.time()
        if self._upstream is not None:
            self._upstream.resume()

    # --- towards the replica -------------------------------------------------------------------

    def _attempt(self) -> None:
        candidates = self._relay.replicas.available(self._tried)
        if not candidates:
            self._give_up()
            return
        if self._tried:
            self._relay.retries += 1
        replica = self._relay.picker.pick(candidates, self._request)
        self._tried.append(replica)
        self._replica = replica
        replica.in_flight += 1
        replica.picks += 1
        idle = self._relay.take_idle(replica)
        if idle is not None:
            self._send(idle)
        else:
            self._opening = self._loop.create_task(self._open(replica))

    async def _open(self, replica: Replica) -> None:
        target = replica.target
        try:
            async with asyncio.timeout(self._relay.limits.connect_timeout):
                _, side = await self._loop.create_connection(
                    lambda: ReplicaSide(self._relay, replica),
                    target.host,
                    target.port,
                    ssl=self._relay.tls if target.tls else None,
                )
        except OSError as error:
            self._opening = None
            self.failed(f"cannot connect ({error or 'timed out'})")
            return
        self._opening = None
        self._send(side)

    def _send(self, side: ReplicaSide) -> None:
        self._upstream = side
        if self._client.paused:
            side.pause()
        side.send(self, self._request)

    def _retry_fresh(self, replica: Replica) -> None:
        """Again to the same replica: it closed an idle connection just as we wrote to it."""
        self._upstream = None
        self._opening = self._loop.create_task(self._open(replica))

    # --- from the replica ----------------------------------------------------------------------

    def head(self, status: int, reason: bytes, headers: Headers, delimited: bool) -> bytes | None:
        """The response's head has come: the bytes that begin the client's response, or None when
        the request goes to another replica instead. delimited: the body's end is marked."""
        if status == 503 and self._relay.replicas.available(self._tried):
            self._leave(reusable=False)
            self._attempt()
            return None
        self._status, self._delimited = status, delimited
        self._keep_alive = delimited and self._request.keep_alive and self._request.version == "1.1"
        return response_head(status, reason, headers, self._keep_alive)

    def body(self, data: bytes) -> None:
        """Pass bytes on to the client as they are."""
        replica = self._replica
        assert replica is not None
        replica.relayed_bytes += len(data)
        replica.relayed_chunks += 1
        self._last_byte = self._loop.time()
        self._client.write(data)

    def complete(self, reusable: bool) -> None:
        """The response is whole. reusable: its connection can carry another request."""
        assert self._replica is not None
        self._relay.replicas.succeeded(self._replica)
        self._relay.answered[self._status] += 1
        self._end(reusable)
        self._client.finished(self._keep_alive)

    def failed(self, reason: str, *, stale: bool = False) -> None:
        """The replica failed. stale: on a connection that had been idle, without a byte."""
        replica = self._replica
        assert replica is not None
        if stale:
            self._retry_fresh(replica)
            return
        self._relay.replicas.failed(replica, reason)
        self._last_failure = f"{replica.target}: {reason}"
        if self._status:
            self._cut_off()
        else:
            self._leave(reusable=False)
            self._attempt()

    # --- ends ----------------------------------------------------------------------------------

    def _cut_off(self) -> None:
        self._relay.cut_off += 1
        self._end(reusable=False)
        if self._delimited:
            self._client.finished(keep_alive=False)
        else:
            # Without a marked end a plain close would look like the end of the body.
            self._client.close()

    def _give_up(self) -> None:
        if self._last_failure:
            status, message = 502, f"every replica failed; the last: {self._last_failure}"
        else:
            status = 503
            message = f"no healthy replica: {self._relay.replicas.describe_outage()}"
        self._end(reusable=False)
        own = error_answer(status, message, retry_after=1)
        self._client.answer(own, self._request.keep_alive)

    def _look_at_clock(self) -> None:
        limit = self._relay.limits.timeout
        left = self._last_byte + limit - self._loop.time()
        if left > 0 or self._client.paused:
            self._timer = self._loop.call_later(left if left > 0 else 1.0, self._look_at_clock)
        elif self._status:
            self._cut_off()
        else:
            target = self._replica.target if self._replica else "a replica"
            message = f"{target} brought no answer within {limit:g} s"
            self._end(reusable=False)
            self._client.answer(error_answer(504, message), self._request.keep_alive)

    def _leave(self, reusable: bool) -> None:
        """Let go of the replica and of its connection."""
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        if self._upstream is not None:
            self._upstream.release(reusable)
            self._upstream = None
        if self._replica is not None:
            self._replica.in_flight -= 1
            self._replica = None

    def _end(self, reusable: bool) -> None:
        self._leave(reusable)
        self._relay.in_flight -= 1
        if self._timer is not None:
            self._timer.cancel()


class ReplicaSide(asyncio.Protocol):
    """A connection to a replica: one request at a time, idle between them."""

    def __init__(self, relay: Relay, replica: Replica) -> None:
        self.replica = replica
        self._relay = relay
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._used = False
        self._paused = False
        self._parser = httptools.HttpResponseParser(self)
        self._begin(headless=False)

    def _begin(self, headless: bool) -> None:
        self._headless = headless
        self._status = 0
        self._head = b""
        self._reason = b""
        self._headers: Headers = []
        self._head_whole = False
        self._head_passed = False
        self._whole = False
        self._surplus = False
        self._keep = False

    @property
    def open(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, exchange: Exchange, request: Request) -> None:
        """Write a request; its response goes to the exchange."""
        assert self._exchange is None
        self._exchange = exchange
        self._parser = httptools.HttpResponseParser(self)
        self._begin(headless=request.method == b"HEAD")
        if self._transport is None or self._transport.is_closing():
            self._fail("the connection was closed")
        else:
            self._transport.write(request_bytes(request))

    def release(self, reusable: bool) -> None:
        """The exchange lets go: keep the connection for another request, or close it."""
        self._exchange = None
        self._used = True
        if reusable and self.open:
            self.resume()
            self._relay.keep_idle(self)
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
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            self.close()  # nothing was asked
            return
        if not self._head_passed:
            self._head += data
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"answered something that is not HTTP/1.1 ({error})")
            return
        if self._surplus:
            self._fail("sent more than its response")
        elif self._head_passed:
            exchange.body(data)
            if self._whole:
                exchange.complete(self._keep)
        elif self._head_whole:
            self._pass_head(exchange, ended=self._whole)
        elif len(self._head) > self._relay.limits.max_head:
            self._fail("answered with a head that is too large")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._exchange is None:
            self._relay.drop_idle(self)
        elif self._head_whole and not self._delimited and exc is None:
            if self._head_passed:
                self._exchange.complete(reusable=False)
            else:
                self._pass_head(self._exchange, ended=True)
        else:
            self._fail("closed the connection before its response was complete")

    # --- httptools callbacks; on_body is left out, so bodies are never copied -------------------

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

    def on_message_complete(self) -> None:
        if self._status >= 200:
            self._whole = True
        else:  # an interim response (1xx): not passed on, the real one follows
            self._head = self._head.partition(b"\r\n\r\n")[2]
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

    def _pass_head(self, exchange: Exchange, ended: bool) -> None:
        """Pass the head on together with the body's first bytes. Servers send heads before they
        have a token; as long as only a head has come, another replica can still take over."""
        rest = self._head.partition(b"\r\n\r\n")[2]
        ended = ended or self._bodiless
        if not rest and not ended:
            return
        self._head, self._head_passed = b"", True
        head = exchange.head(self._status, self._reason, self._headers, self._delimited)
        if head is None:
            return
        exchange.body(head + rest)
        if ended:
            # The parser waits for the body that a HEAD's length announces: no reuse then.
            exchange.complete(self._keep and self._whole)

    def _fail(self, reason: str) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        silent = self._used and not self._head and not self._head_passed
        if silent and self._transport is None:
            self._exchange = None
            exchange.failed(reason, stale=True)
        else:
            exchange.failed(reason)
