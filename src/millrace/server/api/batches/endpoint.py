"""/v1/files and /v1/batches: from HTTP to `millrace.batch.jobs.api`, and back."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.types import ASGIApp

from millrace.batch.jobs.api import Call
from millrace.common.api_errors import ApiError
from millrace.server.api.context import ApiContext
from millrace.server.api.transport import json_response
from millrace.server.http.access import client_of


class Batches:
    """The endpoints of files and batches; where there is no directory for them, they say so."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def answer(self, request: Request) -> ASGIApp:
        """Any of them."""
        api = self._context.batches
        if api is None:
            raise ApiError(
                404,
                "files and batches are kept where --batch-dir says; start the server with it",
                code="endpoint_not_found",
            )
        reply = await api.answer(
            Call(
                method=request.method,
                path=request.scope["path"],
                query=dict(request.query_params),
                content_type=request.headers.get("content-type", ""),
                owner=client_of(request.scope).owner,
                body=self._context.body_reader.pieces(request),
            )
        )
        if reply.content is not None:
            return FileResponse(reply.content, media_type="application/octet-stream")
        return json_response(reply.value)
