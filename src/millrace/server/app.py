"""The HTTP application: which path does what.

The endpoints that generate stand in modules of their own, one for each family of the API; here
they are put together with the pages that only tell something.
"""

from __future__ import annotations

import time

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from millrace.errors import RequestError
from millrace.server.api.anthropic.endpoint import Anthropic
from millrace.server.api.chat.endpoint import Chat
from millrace.server.api.completions.endpoint import Completions
from millrace.server.api.context import ApiContext, unavailable
from millrace.server.api.load_report import load_route
from millrace.server.api.openai_responses.endpoint import Responses
from millrace.server.api.response_schema import Health, ModelCard, ModelList, Version
from millrace.server.api.tokenize.endpoint import Tokenize
from millrace.server.api.transport import json_response
from millrace.server.engine_link.client import EngineDeadError
from millrace.server.http.errors import ApiError, error_response
from millrace.server.openapi import openapi_document
from millrace.server.telemetry.metrics import MetricsPage
from millrace.version import __version__


class Api:
    """The endpoints of one replica. root: the model's directory. debug: also offer what is only for
    tests of the engine."""

    def __init__(
        self, context: ApiContext, page: MetricsPage, *, root: str, debug: bool = False
    ) -> None:
        self._context = context
        self._client = context.client
        self._page = page
        self._root = root
        self._debug = debug
        self._created = int(time.time())

    def application(self) -> ASGIApp:
        """The ASGI application."""
        routes = [
            *Chat(self._context).routes(),
            *Completions(self._context).routes(),
            *Anthropic(self._context).routes(),
            *Responses(self._context).routes(),
            *Tokenize(self._context).routes(),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/health", self.health),
            Route("/ping", self.health, methods=["GET", "POST"]),
            Route("/metrics", self.metrics_page),
            load_route(self._context.client),
            Route("/version", self.version),
            Route("/openapi.json", self.openapi),
        ]
        if self._debug:
            routes.append(Route("/reset_prefix_cache", self.reset_prefix_cache, methods=["POST"]))
        kinds = (ApiError, RequestError, EngineDeadError, HTTPException, Exception)
        handlers = dict.fromkeys(kinds, error_response)
        return Starlette(routes=routes, exception_handlers=handlers)

    async def models(self, _: Request) -> Response:
        """GET /v1/models"""
        return json_response(ModelList(data=[self._card(name) for name in self._context.names]))

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME"""
        name = request.path_params["name"]
        self._context.check_model(name)
        return json_response(self._card(name))

    def _card(self, name: str) -> ModelCard:
        ready = self._client.ready
        return ModelCard(
            id=name,
            created=self._created,
            root=self._root,
            max_model_len=ready.max_model_len if ready else None,
            vocab_size=self._context.processor.vocab_size,
        )

    async def health(self, _: Request) -> Response:
        """GET /health: 200 once the engine has completed a real step, while it lives."""
        if not self._client.healthy:
            raise unavailable(self._client)
        return json_response(Health("ok"))

    async def metrics_page(self, _: Request) -> Response:
        """GET /metrics"""
        return Response(self._page.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def reset_prefix_cache(self, _: Request) -> Response:
        """POST /reset_prefix_cache: forget every cached prefix that no running request holds."""
        self._client.reset_prefix_cache()
        return Response(status_code=200)

    async def version(self, _: Request) -> Response:
        """GET /version"""
        return json_response(Version(__version__))

    async def openapi(self, _: Request) -> Response:
        """GET /openapi.json"""
        return Response(openapi_document(), media_type="application/json")
