"""One client's connection: uvicorn's HTTP/1.1 protocol, with limits on what a client may cost.

A request's head must arrive within a time and a size, else the connection ends with 408 or 431. A
request that is not HTTP gets an error of the same shape as every other. Limits on bodies are in
`http.bodies`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from millrace.common.api_errors import ApiError


class Connection(HttpToolsProtocol):
    """A connection with limits.

    head_timeout: seconds from the first byte of a request, or from the connection's start, to the
    end of its headers. max_head_bytes: the size of the headers, give or take one read.
    """

    def __init__(self, *args: Any, head_timeout: float, max_head_bytes: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self._head_timeout = head_timeout
        self._max_head_bytes = max_head_bytes
        self._head_size = 0
        self._in_head = True
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
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
        self._in_head = False
        self._head_size = 0
        self._stop_head_timer()
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before and self.scope["http_version"] == "1.0":
            _send_without_chunks(self.cycle)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True  # what comes next, if anything does
        self._head_size = 0

    def send_400_response(self, msg: str) -> None:
        self._reject(400, f"this is not an HTTP/1.1 request: {msg}")

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._head_timeout, self._on_head_timeout)

    def _on_head_timeout(self) -> None:
        if self._head_size:
            self._reject(408, f"the headers did not come within {self._head_timeout:g} s")
        else:
            self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _reject(self, status: int, message: str) -> None:
        """Answer if nothing else is being answered, and close."""
        self._stop_head_timer()
        if self.transport.is_closing():
            return
        if not self._answering:
            body = ApiError(
                status, message, code="invalid_http" if status == 400 else None
            ).encode()
            self.transport.write(
                b"%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n"
                b"\r\n%b" % (STATUS_LINE[status], len(body), body)
            )
        self.transport.close()


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
