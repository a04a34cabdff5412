"""/v1/files and /v1/batches at the gateway. Its batches go to all replicas, through itself.

Each gateway process answers these paths; the catalog's directory joins them. A file comes and goes
in memory here, within the bounds of bodies.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import parse_qsl

from millrace.batch.jobs.api import BatchApi, Call, is_batch_path
from millrace.common.api_errors import ApiError
from millrace.gateway.http.message import (
    LocalReply,
    Request,
    api_error_reply,
    error_reply,
    header,
    json_reply,
)
from millrace.gateway.relay.access import Access
from millrace.gateway.relay.relay import AdminHandler


class WithBatches:
    """Answers local requests: those for files and batches, and those of `others`."""

    def __init__(self, others: AdminHandler, api: BatchApi, access: Access) -> None:
        self._others = others
        self._api = api
        self._access = access

    def handles(self, request: Request) -> bool:
        """As `AdminHandler.handles`."""
        return _concerns(request) or self._others.handles(request)

    async def answer(self, request: Request) -> LocalReply:
        """As `AdminHandler.answer`."""
        if not _concerns(request):
            return await self._others.answer(request)
        if not self._access.allows_api(request):
            return api_error_reply(self._access.refusal(request))
        path, _, query = request.path.decode("latin-1").partition("?")
        call = Call(
            method=request.method.decode("latin-1"),
            path=path,
            query=dict(parse_qsl(query)),
            content_type=header(request.headers, b"content-type").decode("latin-1"),
            owner=self._access.owner(request),
            body=_pieces(request.body),
        )
        try:
            reply = await self._api.answer(call)
            if reply.content is None:
                return json_reply(200, reply.value)
            content = await asyncio.to_thread(reply.content.read_bytes)
        except ApiError as error:
            return api_error_reply(error)
        except FileNotFoundError:
            return error_reply(404, "the file is gone")
        return LocalReply(200, content, "application/octet-stream")


def _concerns(request: Request) -> bool:
    return request.via == "public" and is_batch_path(
        request.path.partition(b"?")[0].decode("latin-1")
    )


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    yield body
