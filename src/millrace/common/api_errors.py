"""Errors of the HTTP APIs, worded alike by the server and the gateway.

The status decides an error's type, its default code and its default headers. Bodies have OpenAI's
shape, or Anthropic's under /v1/messages. How an answer is sent is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

LONGEST_MESSAGE = 2000  # characters; what a client sent may be quoted in a message
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    502: "bad_gateway_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    431: "headers_too_large",
    500: "internal_error",
    502: "bad_gateway",
    503: "unavailable",
    504: "timeout",
}
_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "1"},
    502: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}
_ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ErrorInfo(msgspec.Struct, frozen=True):
    """What went wrong. param: the field of the request at fault. code: a name for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every answer that is not a success."""

    error: ErrorInfo


class ApiError(Exception):
    """A request that gets this status and message.

    code, headers: those of the status where nothing else is given. A long message loses its middle.
    anthropic_message: the words of Anthropic's API, where clients look for others there.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        anthropic_message: str | None = None,
    ) -> None:
        super().__init__(shortened(message))
        self._anthropic_message = anthropic_message
        self.status = status
        self.param = None if param is None else shortened(param)
        self.code = code or _CODES.get(status)
        self.headers = {**_HEADERS.get(status, {}), **(headers or {})}

    @property
    def body(self) -> ErrorBody:
        """The body in OpenAI's shape."""
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, fallback)
        return ErrorBody(ErrorInfo(str(self), kind, self.param, self.code))

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """The body in Anthropic's shape."""
        fallback = "api_error" if self.status >= 500 else "invalid_request_error"
        kind = _ANTHROPIC_TYPES.get(self.status, fallback)
        return {
            "type": "error",
            "error": {"type": kind, "message": self._anthropic_message or str(self)},
        }

    def encode(self, path: str = "") -> bytes:
        """The JSON body as the API of that path has it."""
        return msgspec.json.encode(self.anthropic_body if is_anthropic(path) else self.body)


def is_anthropic(path: str) -> bool:
    """Whether a path (without its query) belongs to Anthropic's API."""
    return path == _ANTHROPIC_PATH or path.startswith(_ANTHROPIC_PATH + "/")


def no_access(given: bool) -> ApiError:
    """401. given: the request had a key, but none that is known."""
    what = "incorrect API key" if given else "no API key"
    return ApiError(401, f"{what}; send one as 'Authorization: Bearer KEY'")


def shutting_down() -> ApiError:
    """503 of a process that takes no new requests, because it has been told to stop."""
    return ApiError(503, "the server is shutting down", code="shutting_down")


def shortened(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """A text of at most `longest` characters, 100 or more; a longer one loses its middle."""
    if len(text) <= longest:
        return text
    part = longest // 2 - 20
    return f"{text[:part]} ... ({len(text)} characters) ... {text[-part:]}"[:longest]
