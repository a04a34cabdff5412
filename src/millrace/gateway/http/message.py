"""HTTP/1.1 as the gateway speaks it: requests, heads to pass on, local replies.

Pure functions between structures and bytes. RequestBodies of responses never come here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Literal
from urllib.parse import unquote_to_bytes

import msgspec

from millrace.common.api_errors import ApiError, is_anthropic

Headers = list[tuple[bytes, bytes]]
Via = Literal["public", "admin", "unix"]

# RFC 9110, 7.6.1: for one connection, never passed on. Transfer-Encoding is not listed: a
# response's body keeps its framing, and a request's body is framed anew.
_HOP_BY_HOP = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"upgrade"),
        *(b"proxy-authenticate", b"proxy-authorization", b"proxy-authentication-info"),
    )
)
# Set anew for the replica, or meant for the gateway alone.
_REPLACED = frozenset(
    (
        *(b"host", b"content-length", b"transfer-encoding", b"expect", b"trailer"),
        *(b"x-request-id", b"x-millrace-probe"),
    )
)
_CREDENTIALS = frozenset(
    (b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key", b"x-auth-token")
)
_WORD_ENDS = re.compile(rb"[\s=;,:\"]+")
MAX_REQUEST_ID = 256


class Request(msgspec.Struct):
    """A complete request. path: with the query, as the client wrote it. id: its X-Request-Id, or a
    new one. peer: the client's address. via: the listener that took the connection: the public
    port, the admin port, or the admin Unix socket."""

    method: bytes
    path: bytes
    version: str
    headers: Headers
    body: bytes
    keep_alive: bool
    id: bytes = b"-"
    peer: str = "-"
    via: Via = "public"


def header(headers: Headers, name: bytes) -> bytes:
    """The first value of a header, b"" without one. name: in lower case."""
    for key, value in headers:
        if len(key) == len(name) and key.lower() == name:
            return value
    return b""


def passed_on(headers: Headers) -> Headers:
    """The headers without those for one connection, in their order and spelling."""
    named = {
        name.strip()
        for key, value in headers
        if key.lower() == b"connection"
        for name in value.lower().split(b",")
    }
    dropped = _HOP_BY_HOP | named
    return [(key, value) for key, value in headers if key.lower() not in dropped]


class Upstream(msgspec.Struct, frozen=True):
    """What a replica is told instead of what the client sent.

    host: the replica's authority. authorization: instead of the client's credentials; None passes
    those on, b"" sends none. secrets: keys of clients; a header or a query parameter that holds one
    is not passed on.
    """

    host: bytes
    authorization: bytes | None = None
    secrets: tuple[bytes, ...] = ()


def request_bytes(
    request: Request,
    upstream: Upstream,
    body: bytes | None = None,
    path: bytes | None = None,
    traceparent: bytes = b"",
) -> bytes:
    """The request for a replica. An HTTP/1.0 client's stays HTTP/1.0, so that the answer comes in
    a framing which that client can read. body, path and traceparent replace the request's own."""
    secrets = upstream.secrets
    dropped = _REPLACED if upstream.authorization is None else _REPLACED | _CREDENTIALS
    if traceparent:
        dropped = dropped | {b"traceparent"}
    headers_out = [(b"Host", upstream.host)]
    for name, value in passed_on(request.headers):
        if name.lower() not in dropped and not _holds(value, secrets):
            headers_out.append((name, value))
    if upstream.authorization:
        headers_out.append((b"Authorization", upstream.authorization))
    headers_out.append((b"X-Request-Id", request.id))
    if traceparent:
        headers_out.append((b"traceparent", traceparent))
    body = request.body if body is None else body
    if body or request.method in (b"POST", b"PUT", b"PATCH"):
        headers_out.append((b"Content-Length", b"%d" % len(body)))
    path = _without_secrets(path or request.path, secrets)
    start = b"%b %b HTTP/%b" % (request.method, path, request.version.encode())
    return _head(start, headers_out) + body


def _holds(value: bytes, secrets: tuple[bytes, ...]) -> bool:
    """Whether one of the words of a header or a query parameter is a secret."""
    return bool(secrets) and not set(secrets).isdisjoint(_WORD_ENDS.split(value))


def _without_secrets(path: bytes, secrets: tuple[bytes, ...]) -> bytes:
    """The path without query parameters that hold a client's key."""
    name, mark, query = path.partition(b"?")
    if not mark or not secrets:
        return path
    kept = [
        parameter
        for parameter in query.split(b"&")
        if not _holds(unquote_to_bytes(parameter), secrets)
    ]
    return name + mark + b"&".join(kept) if kept else name


class ResponseHead(msgspec.Struct, frozen=True):
    """The head of a replica's response. delimited: the body's end is marked; chunked: by chunks."""

    status: int
    reason: bytes
    headers: Headers
    delimited: bool
    chunked: bool


def response_head(head: ResponseHead, keep_alive: bool, request_id: bytes) -> bytes:
    """The head of a relayed response, with the gateway's own Connection header."""
    headers_out = passed_on(head.headers)
    if not header(headers_out, b"x-request-id"):
        headers_out.append((b"X-Request-Id", request_id))
    if not keep_alive:
        headers_out.append((b"Connection", b"close"))
    return _head(b"HTTP/1.1 %d %b" % (head.status, head.reason), headers_out)


def _head(start: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"\r\n".join((start, *(b"%b: %b" % pair for pair in headers), b"", b""))


def as_get(request: Request) -> Request:
    """The request, or the GET whose head a HEAD asks for."""
    return msgspec.structs.replace(request, method=b"GET") if request.method == b"HEAD" else request


class LocalReply(msgspec.Struct, frozen=True):
    """A complete response of the gateway itself. close: the connection ends with it. error: the
    message of an error; the body has it in OpenAI's shape. follow: the body is a part of a stream
    of events; the next part answers the same request with this Last-Event-ID."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    close: bool = False
    error: str | None = None
    follow: str = ""

    def in_shape_of(self, path: bytes) -> LocalReply:
        """The same reply; an error has the shape of the API that the path belongs to."""
        name = path.partition(b"?")[0].decode("latin-1")
        if self.error is None or not is_anthropic(name):
            return self
        return msgspec.structs.replace(self, body=ApiError(self.status, self.error).encode(name))

    def encode(
        self, request_id: bytes = b"", keep_alive: bool = True, *, head_only: bool = False
    ) -> bytes:
        """Its bytes on the wire. head_only: without the body, whose length is said all the same."""
        fields = [("Content-Type", self.content_type), ("Content-Length", str(len(self.body)))]
        encoded = [(k.encode(), v.encode()) for k, v in (*fields, *self.headers)]
        if request_id:
            encoded.append((b"X-Request-Id", request_id))
        if self.close or not keep_alive:
            encoded.append((b"Connection", b"close"))
        start = f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}".encode()
        return _head(start, encoded) + (b"" if head_only else self.body)


def stream_head(reply: LocalReply, request_id: bytes) -> bytes:
    """The head of a stream of which this reply is the first part; the stream ends with the
    connection."""
    fields = [("Content-Type", reply.content_type), *reply.headers, ("Connection", "close")]
    encoded = [(k.encode(), v.encode()) for k, v in fields]
    return _head(b"HTTP/1.1 200 OK", [*encoded, (b"X-Request-Id", request_id)])


def next_part(request: Request, last_id: str) -> Request:
    """The request for the next part of a stream."""
    rest = [pair for pair in request.headers if pair[0].lower() != b"last-event-id"]
    headers = [*rest, (b"Last-Event-ID", last_id.encode())]
    return msgspec.structs.replace(request, headers=headers)


def json_reply(status: int, value: object) -> LocalReply:
    """A LocalReply whose body is this value as JSON."""
    return LocalReply(status, msgspec.json.encode(value))


def error_reply(
    status: int,
    message: str,
    *,
    retry_after: int | None = None,
    close: bool = False,
    code: str | None = None,
    headers: Sequence[tuple[str, str]] = (),
) -> LocalReply:
    """An error, as every API of Millrace has it. retry_after: seconds."""
    more = dict(headers)
    if retry_after is not None:
        more["Retry-After"] = str(retry_after)
    return api_error_reply(ApiError(status, message, code=code, headers=more), close=close)


def api_error_reply(error: ApiError, *, close: bool = False) -> LocalReply:
    """The reply of a request that gets this error."""
    headers = tuple(error.headers.items())
    return LocalReply(error.status, error.encode(), headers=headers, close=close, error=str(error))
