"""HTTP/1.1 as the gateway speaks it: requests, heads to pass on, answers of its own.

Pure functions between structures and bytes. Bodies of responses never come here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from http import HTTPStatus

import msgspec

Headers = list[tuple[bytes, bytes]]

# RFC 9110, 7.6.1: meant for one connection, never passed on. Transfer-Encoding is left out here:
# a response's body is relayed in the framing it came in, and a request's is framed anew.
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"upgrade", b"proxy-authenticate")
)
_FRAMING = frozenset((b"content-length", b"transfer-encoding", b"expect"))


class Request(msgspec.Struct):
    """A whole request of a client. path: with the query, as the client wrote it."""

    method: bytes
    path: bytes
    version: str
    headers: Headers
    body: bytes
    keep_alive: bool


def passed_on(headers: Headers) -> Headers:
    """The headers without those meant for one connection, in their order and spelling."""
    named = {
        name.strip()
        for key, value in headers
        if key.lower() == b"connection"
        for name in value.lower().split(b",")
    }
    dropped = _HOP_BY_HOP | named
    return [(key, value) for key, value in headers if key.lower() not in dropped]


def request_bytes(request: Request) -> bytes:
    """The request for a replica. An HTTP/1.0 client's stays HTTP/1.0, so that the answer comes in
    a framing which that client can read."""
    kept = [(k, v) for k, v in passed_on(request.headers) if k.lower() not in _FRAMING]
    if request.body or request.method in (b"POST", b"PUT", b"PATCH"):
        kept.append((b"Content-Length", str(len(request.body)).encode()))
    start = b"%b %b HTTP/%b" % (request.method, request.path, request.version.encode())
    return _head(start, kept) + request.body


def response_head(status: int, reason: bytes, headers: Headers, keep_alive: bool) -> bytes:
    """The head of a relayed response, with the gateway's own word on its connection."""
    kept = passed_on(headers)
    if not keep_alive:
        kept.append((b"Connection", b"close"))
    return _head(b"HTTP/1.1 %d %b" % (status, reason), kept)


def _head(start: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"\r\n".join((start, *(b"%b: %b" % pair for pair in headers), b"", b""))


class Answer(msgspec.Struct, frozen=True):
    """A whole response of the gateway itself, as bytes."""

    status: int
    data: bytes


def answer(
    status: int,
    body: bytes,
    content_type: str = "application/json",
    headers: Sequence[tuple[str, str]] = (),
) -> Answer:
    """An Answer with this body; it leaves the connection open."""
    fields = [("Content-Type", content_type), ("Content-Length", str(len(body))), *headers]
    encoded = [(name.encode(), value.encode()) for name, value in fields]
    start = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()
    return Answer(status, _head(start, encoded) + body)


_ERROR_TYPES = {429: "rate_limit_error", 502: "bad_gateway", 503: "unavailable", 504: "timeout"}


def error_answer(
    status: int, message: str, *, retry_after: int | None = None, close: bool = False
) -> Answer:
    """An error in OpenAI's shape. retry_after: seconds."""
    kind = _ERROR_TYPES.get(status, "invalid_request_error")
    error = {"message": message, "type": kind, "param": None, "code": status}
    headers = [] if retry_after is None else [("Retry-After", str(retry_after))]
    if close:
        headers.append(("Connection", "close"))
    return answer(status, msgspec.json.encode({"error": error}), headers=headers)
