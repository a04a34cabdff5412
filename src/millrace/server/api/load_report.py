"""GET /load: what this replica carries, for a gateway that asks a few times a second.

It is read from the front's own books of open requests: the engine is not asked, and does not wait.
"""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millrace.common.prefix_hash import PrefixReport
from millrace.server.api.transport import json_response
from millrace.server.engine_link.client import EngineClient


class Load(msgspec.Struct, frozen=True, omit_defaults=True):
    """requests: open ones. tokens: their prompts and outputs so far. prefixes: told to who asks
    for them with `?prefixes_since=CURSOR`, 0 at first, where there is a prefix cache."""

    requests: int
    tokens: int
    prefixes: PrefixReport | None = None


def load_route(client: EngineClient) -> Route:
    """The route."""

    async def load(request: Request) -> Response:
        cursor = request.query_params.get("prefixes_since")
        prefixes = None if cursor is None else client.prefix_reporter.report(cursor)
        return json_response(Load(client.open_requests, client.open_tokens, prefixes))

    return Route("/load", load)
