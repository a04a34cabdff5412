"""The HTTP application: the endpoints of `routes.ROUTES`, bound to one replica.

It knows no endpoint by name; what a path does stands in the table and in the families' modules.
"""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp

from millrace.common.api_errors import ApiError
from millrace.errors import ModelError, RequestError
from millrace.server.api.context import ApiContext
from millrace.server.api.pages import Pages
from millrace.server.engine_link.client import EngineDeadError
from millrace.server.http.errors import error_response
from millrace.server.openapi import openapi_document
from millrace.server.routes import ROUTES
from millrace.server.telemetry.metrics import MetricsPage


def application(
    context: ApiContext, metrics_page: MetricsPage, *, root: str, debug: bool = False
) -> ASGIApp:
    """The ASGI application of one replica.

    root: the model's directory. debug: also offer the endpoints that only tests of the engine need.
    """
    offered = [route for route in ROUTES if debug or not route.debug]
    pages = Pages(context, metrics_page, root=root, document=openapi_document(offered))
    families: dict[type[Any], Any] = {Pages: pages}
    for row in offered:
        if row.family not in families:
            families[row.family] = row.family(context)
    routes = [
        Route(row.path, row.handler.__get__(families[row.family]), methods=list(row.methods))
        for row in offered
    ]
    errors = (ApiError, RequestError, ModelError, EngineDeadError, HTTPException, Exception)
    return Starlette(routes=routes, exception_handlers=dict.fromkeys(errors, error_response))
