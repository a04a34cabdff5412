"""The pages for people: `/`, `/docs`, `/dashboard` and what they load; and the live page's stream.

The files need no key, for they hold no figures. The stream needs one where there are keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from millrace.common.api_errors import ApiError
from millrace.dashboard.files import EVENTS_PATH, HEADERS, PATHS, file_at
from millrace.dashboard.stream import CONTENT_TYPE, MAX_VIEWERS, Cursor
from millrace.server.telemetry.live_page import LivePage

_EVERY = 1.0  # seconds


class LivePages:
    """stopping: whether the server ends, so that viewers are let go."""

    def __init__(self, live: LivePage, stopping: Callable[[], bool]) -> None:
        self._live, self._stopping = live, stopping

    def routes(self) -> list[Route]:
        """The paths of the pages."""
        return [
            Route(EVENTS_PATH, self.events, methods=["GET"]),
            *(Route(path, self.file, methods=["GET"]) for path in PATHS),
        ]

    async def file(self, request: Request) -> Response:
        """A page, or what it loads."""
        found = file_at(request.scope["path"])
        assert found is not None
        return Response(found.body, media_type=found.media_type, headers=dict(HEADERS))

    async def events(self, request: Request) -> Response:
        """GET /dashboard/events: a stream of server-sent events, one each second."""
        if self._live.viewers >= MAX_VIEWERS:
            raise ApiError(503, f"{MAX_VIEWERS} viewers watch already", code="too_many_viewers")
        cursor = Cursor.parse(request.headers.get("last-event-id", ""))
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        if request.method == "HEAD":
            return Response(media_type=CONTENT_TYPE, headers=headers)
        return StreamingResponse(self._stream(cursor), media_type=CONTENT_TYPE, headers=headers)

    async def _stream(self, cursor: Cursor) -> AsyncIterator[bytes]:
        self._live.viewers += 1
        try:
            while not self._stopping():
                message, cursor = self._live.message(cursor)
                yield message
                await asyncio.sleep(_EVERY)
        finally:
            self._live.viewers -= 1
