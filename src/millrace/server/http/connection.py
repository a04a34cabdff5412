"""One client's connection: uvicorn's HTTP/1.1 protocol, with limits on what a client may cost.

A request's head must be there within a time and a size, or the connection ends with 408 or 431; a
request that is no HTTP gets an error of the same shape as every other. What a body may cost is
`http.Bodies`'s business.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from millrace.server.http.errors import ApiError


class Connection(HttpToolsProtocol):
    """A connection with bounds.

    head_seconds: from the first byte of a request, or the connection's begin, to the end of its
    headers. head_bytes: how large they may be together, give or take one read.
    """

    def __init__(self, *args: Any, head_seconds: float, head_bytes: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self._head_seconds = head_seconds
        self._head_bytes = head_bytes
        self._head_size = 0
        self._in_head = True
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.parser is None or self.transport.is_closing():
            return
        if self._late is None and self._in_head and not self._answering:
            self._await_head()
        self._head_size += len(data)
        super().data_received(data)
        if self._in_head and self._head_size > self._head_bytes:
            self._refuse(431, f"the headers are larger than {self._head_bytes} bytes")

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_size = 0
        self._stop_clock()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True  # what comes next, if anything does
        self._head_size = 0

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, f"this is no HTTP/1.1 request: {msg}")

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._late = self.loop.call_later(self._head_seconds, self._too_late)

    def _too_late(self) -> None:
        if self._head_size:
            self._refuse(408, f"the headers did not come within {self._head_seconds:g} s")
        else:
            self.transport.close()

    def _stop_clock(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, status: int, message: str) -> None:
        """Answer if nothing else is being answered, and close."""
        self._stop_clock()
        if self.transport.is_closing():
            return
        if not self._answering:
            body = msgspec.json.encode(ApiError(status, message, code=_CODES[status]).body)
            self.transport.write(
                b"%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n"
                b"\r\n%b" % (STATUS_LINE[status], len(body), body)
            )
        self.transport.close()


_CODES = {400: "invalid_http", 408: "request_timeout", 431: "headers_too_large"}


def connection_class(head_seconds: float, head_bytes: int) -> type[asyncio.Protocol]:
    """`Connection` with these limits, in the form that uvicorn asks for."""

    class Limited(Connection):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, head_seconds=head_seconds, head_bytes=head_bytes, **more)

    return Limited
