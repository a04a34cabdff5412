"""HTTP/1.1 from the client's side: one keep-alive connection, every received piece with its time.

Used where the fleet plane asks a server something: the load generator, health checks, the
supervisor. It knows how a response is framed, when its bytes came, and the shape of an error body;
what else they mean is for others.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from time import perf_counter_ns
from typing import cast

import httptools
import msgspec

from millrace.target import Target as Target
from millrace.target import parse_base_url as parse_base_url
from millrace.target import parse_url as parse_url


def encode_request(
    target: Target,
    method: str,
    path: str,
    body: bytes = b"",
    headers: tuple[tuple[str, str], ...] = (),
) -> bytes:
    """The bytes of one request that asks for the connection to be kept open.

    headers: replace those of the same name that this function would add, and of several with one
    name the first is sent. The framing of the body is not theirs to set.
    """
    lines = {"host": f"Host: {target.authority}"}
    if body:
        lines["content-type"] = "Content-Type: application/json"
    given: dict[str, str] = {}
    for name, value in headers:
        if name.lower() not in _FRAMING:
            given.setdefault(name.lower(), f"{name}: {value}")
    lines |= given
    if body or method == "POST":
        lines["content-length"] = f"Content-Length: {len(body)}"
    query = f"{'&' if '?' in path else '?'}{target.query}" if target.query else ""
    start = f"{method} {target.prefix}{path}{query} HTTP/1.1"
    return "\r\n".join((start, *lines.values(), "\r\n")).encode() + body


_FRAMING = ("content-length", "transfer-encoding")
_SWITCHING = 101  # the connection leaves HTTP; no other answer follows


class Response:
    """What came back for one request.

    pieces: (time, body bytes) as received, time in ns of `perf_counter_ns` and taken before the
    bytes were looked at. error: None when the response is whole, else one line that says what
    broke; the pieces that came before are kept. end_ns: when it was whole or broke.
    """

    __slots__ = ("end_ns", "error", "headers", "pieces", "status")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pieces: list[tuple[int, bytes]] = []
        self.error: str | None = None
        self.end_ns = 0

    @property
    def body(self) -> bytes:
        """All body bytes received, without chunk framing."""
        return b"".join(piece for _, piece in self.pieces)


class Reading:
    """A response while it is read. got: what has come; whole: nothing is missing; keep: the
    connection may carry another request; chunked: how the body is framed."""

    __slots__ = ("_now", "_parser", "chunked", "got", "keep", "whole")

    def __init__(self) -> None:
        self.got = Response()
        self.whole = self.keep = self.chunked = False
        self._now = 0
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)

    def feed(self, now: int, data: bytes) -> None:
        """Take bytes that came at that time. Raises httptools.HttpParserError."""
        assert self._parser is not None, "nothing is read any more"
        self._now = now
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            if not self.whole:
                raise
            self.keep = False  # bytes after the response, which belong to no request

    def release(self) -> None:
        """Nothing more is read. The parser and this hold each other, and nobody may be collecting
        garbage."""
        self._parser = None

    @property
    def open_ended(self) -> bool:
        """Whether the body has neither a length nor chunks, and so ends with its connection."""
        framed = "content-length" in self.got.headers or self.chunked
        return self.got.status != 0 and not framed

    # --- httptools callbacks -------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.whole:
            raise ValueError("a second response")  # ends the parsing, see `feed`

    def on_header(self, name: bytes, value: bytes) -> None:
        self.got.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self.got.status = self._parser.get_status_code()
        self.keep = self._parser.should_keep_alive()
        coding = self.got.headers.get("transfer-encoding", "")
        self.chunked = coding.lower().endswith("chunked")

    def on_body(self, body: bytes) -> None:
        self.got.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        if 100 <= self.got.status < 200 and self.got.status != _SWITCHING:
            self.got.status = 0  # an interim answer: the real one follows
            self.got.headers = {}
            self.chunked = False
        else:
            self.whole = True


class Connection(asyncio.Protocol):
    """A connection that carries one request at a time and is kept open between them."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._reading = Reading()
        self._waiter: asyncio.Future[Response] | None = None

    @property
    def open(self) -> bool:
        """Whether another request may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def local_port(self) -> int:
        """The port of our end; 0 when it is closed."""
        name = self._transport.get_extra_info("sockname") if self._transport else None
        return int(name[1]) if name else 0

    @property
    def busy(self) -> bool:
        """Whether a response is still awaited."""
        return self._waiter is not None

    def send(self, request: bytes) -> asyncio.Future[Response]:
        """Write one encoded request; the future resolves to its response and never raises."""
        assert self._waiter is None, "one request at a time"
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        self._reading = Reading()
        if self._transport is None or self._transport.is_closing():
            self._finish("the connection was closed")
        else:
            self._transport.write(request)
        return waiter

    def close(self) -> None:
        """Drop the connection; a response under way ends with an error."""
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        now = perf_counter_ns()
        if self._waiter is None:  # bytes that nobody asked for
            self.close()
            return
        reading = self._reading
        try:
            reading.feed(now, data)
        except httptools.HttpParserError as error:
            self._finish(f"the server answered something that is not HTTP/1.1 ({error})")
            self.close()
            return
        if reading.whole:
            self._finish(None, now)
            if not reading.keep:
                self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._reading.open_ended and exc is None:
            self._finish(None)
        elif self._reading.got.status:
            self._finish("the server closed the connection before the response was complete")
        else:
            self._finish("the server closed the connection without an answer")

    def _finish(self, error: str | None, now: int | None = None) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is None:
            return
        response = self._reading.got
        response.error = error
        response.end_ns = now or perf_counter_ns()
        self._reading.release()
        if not waiter.done():
            waiter.set_result(response)


@functools.cache
def ssl_context(verify: bool) -> ssl.SSLContext:
    """The context of all connections of this process: making one takes some 20 ms."""
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


async def connect(target: Target) -> Connection:
    """An open connection. Raises OSError when there is none to be had."""
    context = ssl_context(target.verify) if target.tls else None
    _, connection = await asyncio.get_running_loop().create_connection(
        Connection, target.host, target.port, ssl=context
    )
    return connection


async def fetch(
    target: Target,
    path: str,
    *,
    method: str = "GET",
    body: bytes = b"",
    headers: tuple[tuple[str, str], ...] = (),
    timeout: float = 5.0,
) -> Response:
    """One request over a connection of its own; timeout in seconds, for all of it.

    Raises OSError (TimeoutError among them) when no whole response comes.
    """
    async with asyncio.timeout(timeout):
        connection = await connect(target)
        try:
            response = await connection.send(encode_request(target, method, path, body, headers))
        finally:
            connection.close()
    if response.error is not None:
        raise ConnectionError(response.error)
    return response


def error_text(body: bytes) -> str:
    """The message of an OpenAI-shaped error body, else the body's beginning, on one line."""
    try:
        decoded = msgspec.json.decode(body)
        inner = decoded.get("error", decoded) if isinstance(decoded, dict) else decoded
        message = inner.get("message", inner) if isinstance(inner, dict) else inner
    except (msgspec.DecodeError, UnicodeDecodeError):
        message = body[:300].decode("utf-8", "replace")
    return " ".join(str(message).split())[:300] or "(empty body)"
