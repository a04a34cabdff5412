"""One client's connection: uvicorn's HTTP/1.1 protocol, with limits on what a client may cost.

A request's head must arrive within a time and a size, else the connection ends with 408 or 431. A
request that is not HTTP gets an error of the same shape as every other. Limits on bodies are in
`http.bodies`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from millrace.common.api_errors import ApiError
from millrace.request_parser import RequestParser

LINGER_PAUSE, LINGER_SECONDS = 2.0, 10.0
# For the rest of a body that came after its answer; then the connection ends.
UNWANTED_BODY_SECONDS = 10.0


class LingeringTransport:
    """A transport that does not lose the last answer when it is closed.

    A socket that is closed while the client still sends is reset, and the client then loses what it
    has not read yet. So where the client may still be sending, `close` ends our side only and what
    arrives is dropped, until the client has ended its side, LINGER_PAUSE seconds have passed
    without data, or LINGER_SECONDS in all.
    """

    def __init__(self, transport: asyncio.Transport, may_receive: Callable[[], bool]) -> None:
        self._transport = transport
        self._may_receive = may_receive
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = 0.0
        self.write = transport.write
        self.get_extra_info = transport.get_extra_info
        self.pause_reading = transport.pause_reading
        self.set_protocol = transport.set_protocol

    @property
    def lingering(self) -> bool:
        """Whether it is closed for answers, and what arrives is to be dropped."""
        return self._timer is not None

    def is_closing(self) -> bool:
        return self.lingering or self._transport.is_closing()

    def resume_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def close(self) -> None:
        """Send what is written, then close, after a while if the client may still be sending."""
        if self.is_closing():
            return
        if not self._may_receive():
            self._transport.close()
            return
        self._deadline = self._loop.time() + LINGER_SECONDS
        self.received()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self.resume_reading()

    def received(self) -> None:
        """Data came while it lingers."""
        if self._timer is not None:
            self._timer.cancel()
        at = min(self._loop.time() + LINGER_PAUSE, self._deadline)
        self._timer = self._loop.call_at(at, self._transport.close)

    def ended(self) -> None:
        """The connection is gone."""
        if self._timer is not None:
            self._timer.cancel()


class Connection(HttpToolsProtocol):
    """A connection with limits.

    head_timeout: seconds from the first byte of a request, or from the connection's start, to the
    end of its headers. max_head_bytes: the size of the headers, give or take one read.
    """

    def __init__(self, *args: Any, head_timeout: float, max_head_bytes: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self._parser = RequestParser(self, lambda: (self.url, self.headers), data_after_close=True)
        self.parser = self._parser  # type: ignore[assignment]
        self._head_timeout = head_timeout
        self._max_head_bytes = max_head_bytes
        self._head_size = 0
        self._in_head = True
        self._in_body = False
        self._rejected = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._lingering = LingeringTransport(transport, self._may_receive)
        super().connection_made(self._lingering)  # type: ignore[arg-type]
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_body_timer()
        self._lingering.ended()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._lingering.lingering:
            self._lingering.received()
            return
        if self.parser is None or self.transport.is_closing():
            return
        if self._head_timer is None and self._in_head and not self._answering:
            self._start_head_timer()
        self._head_size += len(data)
        super().data_received(data)
        if self._in_head and self._head_size > self._max_head_bytes:
            self._reject(431, f"the headers are larger than {self._max_head_bytes} bytes")

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._parser.again:
            return
        self._in_head = False
        self._in_body = True
        self._head_size = 0
        self._stop_head_timer()
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before and self.scope["http_version"] == "1.0":
            _send_without_chunks(self.cycle)

    def on_message_complete(self) -> None:
        if self._parser.again:
            return
        super().on_message_complete()
        self._in_head = True  # what comes next, if anything does
        self._in_body = False
        self._head_size = 0
        self._stop_body_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body and not self.pipeline and not self._answering:
            self._body_timer = self.loop.call_later(UNWANTED_BODY_SECONDS, self._on_unwanted_body)

    def send_400_response(self, msg: str) -> None:
        self._reject(400, f"this is not an HTTP/1.1 request: {msg}")

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _may_receive(self) -> bool:
        """Whether the client may be sending something that nobody reads."""
        return self._in_body or self._rejected

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._head_timeout, self._on_head_timeout)

    def _on_head_timeout(self) -> None:
        if self._head_size:
            self._reject(408, f"the headers did not come within {self._head_timeout:g} s")
        else:
            self.transport.close()

    def _on_unwanted_body(self) -> None:
        self._in_body = False  # the answer has long been sent: nothing is worth waiting for
        self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_body_timer(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _reject(self, status: int, message: str) -> None:
        """Answer, unless part of another answer has been sent, and close."""
        self._stop_head_timer()
        if self.transport.is_closing():
            return
        if self._can_answer():
            code = "invalid_http" if status == 400 else None
            body = ApiError(status, message, code=code).encode()
            self.transport.write(
                b"%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n"
                b"\r\n%b" % (STATUS_LINE[status], len(body), body)
            )
        self._rejected = True
        self.transport.close()
        if self._answering:  # the application learns that nobody reads its answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _can_answer(self) -> bool:
        return not self.pipeline and not (self._answering and self.cycle.response_started)


def _send_without_chunks(cycle: RequestResponseCycle) -> None:
    """Have a response without a length end with its connection: HTTP/1.0 knows no chunks.

    The cycle has not begun to run yet.
    """
    send = cycle.send
    unframed = False

    async def send_unframed(message: Any) -> None:
        nonlocal unframed
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            unframed = b"content-length" not in names
            cycle.chunked_encoding = False if unframed else None
        elif message["type"] == "http.response.body" and unframed:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_unframed  # type: ignore[method-assign]


def connection_class(head_timeout: float, max_head_bytes: int) -> type[asyncio.Protocol]:
    """`Connection` with these limits, in the form that uvicorn asks for."""

    class Limited(Connection):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(
                *args, head_timeout=head_timeout, max_head_bytes=max_head_bytes, **more
            )

    return Limited
