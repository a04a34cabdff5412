"""Which errors clients see, and the responses that carry them."""

from __future__ import annotations

import logging

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from millrace.common.api_errors import ApiError
from millrace.errors import ModelError, RequestError, TransferError
from millrace.lengths import ContextLengthError
from millrace.server.engine_link.client import EngineDeadError

logger = logging.getLogger(__name__)


class ClientGoneError(Exception):
    """The client has closed its connection; nobody reads an answer."""


def as_api_error(error: Exception) -> ApiError:
    """The error that a client sees. An unknown kind is a fault of the server, and is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        words = error.anthropic_words if isinstance(error, ContextLengthError) else None
        return ApiError(
            400, str(error), param=error.param, code=error.code, anthropic_message=words
        )
    if isinstance(error, ModelError):
        logger.error("a request failed: %s", error)
        return ApiError(500, str(error), code="model_failed")
    if isinstance(error, TransferError):
        logger.error("a request failed: %s", error)
        return ApiError(502, str(error), code="kv_transfer_failed")
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_dead")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail, headers=error.headers)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; the server's log has the details")


async def error_response(request: Request, error: Exception) -> Response:
    """The answer to a request that raised `error`, in the shape of the API that it asked."""
    api_error = as_api_error(error)
    return Response(
        api_error.encode(request.scope["path"]),
        status_code=api_error.status,
        headers=api_error.headers,
        media_type="application/json",
    )
