"""Errors as OpenAI's clients expect them: a status and an `error` object in the body."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from millrace.errors import RequestError
from millrace.server.engine_link.client import EngineDeadError

logger = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
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
    """A request that gets this status and message."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> ErrorBody:
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, fallback)
        return ErrorBody(ErrorInfo(str(self), kind, self.param, self.code))


class ClientGoneError(Exception):
    """The client has closed its connection; nobody reads an answer."""


def as_api_error(error: Exception) -> ApiError:
    """The error that a client sees. An unknown kind is a fault of the server, and is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param, code=error.code)
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_dead")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail, headers=error.headers)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; the server's log has the details", code="internal_error")


async def error_response(request: Request, error: Exception) -> Response:
    """The answer to a request that raised `error`."""
    api_error = as_api_error(error)
    return Response(
        msgspec.json.encode(api_error.body),
        status_code=api_error.status,
        headers=api_error.headers,
        media_type="application/json",
    )
