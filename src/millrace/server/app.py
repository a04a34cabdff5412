"""The HTTP application: the endpoints of `routes.ROUTES`, bound to one replica.

It knows no endpoint by name; what a path does stands in the table and in the families' modules.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from millrace.common.api_errors import ApiError
from millrace.errors import ModelError, RequestError, TransferError
from millrace.server.api.context import ApiContext
from millrace.server.api.pages import Pages
from millrace.server.engine_link.client import EngineDeadError
from millrace.server.http.errors import error_response
from millrace.server.http.live_pages import LivePages
from millrace.server.openapi import openapi_document
from millrace.server.routes import ABSENT, ROUTES
from millrace.server.telemetry.live_page import LivePage
from millrace.server.telemetry.metrics import MetricsPage

_ANY = ["GET", "POST", "PUT", "DELETE"]
_UNMANAGED = "start the server with --admin-key, and send that key"


def application(
    context: ApiContext,
    metrics_page: MetricsPage,
    live: LivePage | None,
    *,
    root: str,
    managed: bool = False,
) -> ASGIApp:
    """The ASGI application of one replica.

    live: what /dashboard shows; None: there are no pages. root: the model's directory. managed:
    also offer the endpoints that change what the engine does.
    """
    offered = [route for route in ROUTES if managed or not route.manages]
    absent = dict(ABSENT)
    absent.update((row.path, _UNMANAGED) for row in ROUTES if row not in offered)
    pages = Pages(context, metrics_page, live, root=root, document=openapi_document(offered))
    families: dict[type[Any], Any] = {Pages: pages}
    for row in offered:
        if row.family not in families:
            families[row.family] = row.family(context)
            metrics_page.gauges.update(getattr(families[row.family], "gauges", {}))
    routes = [
        Route(row.path, row.handler.__get__(families[row.family]), methods=list(row.methods))
        for row in offered
    ]
    if live is not None:
        routes += LivePages(live, lambda: context.client.draining).routes()
    routes += [Route(path, _refusal(path, why), methods=_ANY) for path, why in absent.items()]
    errors = (
        ApiError, RequestError, ModelError, TransferError, EngineDeadError, HTTPException,
        Exception,
    )  # fmt: skip
    return Starlette(routes=routes, exception_handlers=dict.fromkeys(errors, error_response))


def _refusal(path: str, why: str) -> Callable[[Request], Awaitable[ASGIApp]]:
    """An endpoint that is not here, and says why."""

    async def refuse(_: Request) -> NoReturn:
        raise ApiError(404, f"{path} is not here: {why}", code="endpoint_not_found")

    return refuse
