"""GET /load: what this replica carries, for a gateway that asks a few times a second.

It is read from the front's own books of open requests: the engine is not asked, and does not wait.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from millrace.server.engine_client import EngineClient


def load_route(client: EngineClient) -> Route:
    """The route. `requests`: open ones; `tokens`: their prompts and outputs so far."""

    async def load(_: Request) -> JSONResponse:
        return JSONResponse({"requests": client.open_requests, "tokens": client.open_tokens})

    return Route("/load", load)
