"""The endpoints that only report: models, health, metrics, load, version, the OpenAPI document.

/load is read from the server's own list of open requests: the engine is not asked, so a gateway
may ask several times a second.
"""

from __future__ import annotations

import time
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from millrace.common.prefix_hash import PrefixReport
from millrace.dashboard.sample import Sample
from millrace.server.api.context import ApiContext, unavailable
from millrace.server.api.response_schema import (
    Health,
    ModelCard,
    ModelList,
    RecordAddress,
    Version,
)
from millrace.server.api.transport import json_response
from millrace.server.http.access import client_of
from millrace.server.telemetry.live_page import LivePage
from millrace.server.telemetry.metrics import MetricsPage
from millrace.version import __version__


class Load(msgspec.Struct, frozen=True, omit_defaults=True):
    """Answer of /load. requests: open ones. tokens: of their prompts and their outputs so far.
    server_load: the same as requests, under vLLM's name.

    prefixes: sent where the query has `prefixes_since=CURSOR` (0 at first), there is a prefix
    cache, and the server has no keys or the request has the gateway's. role: in serving prompts and
    answers apart, if it has one. samples: what happened in each second after `samples_since`, where
    the query has it; a minute at most.
    """

    requests: int
    tokens: int
    server_load: int
    prefixes: PrefixReport | None = None
    role: Literal["prefill", "decode", "both"] | None = None
    samples: list[Sample] = []


class Pages:
    """The reporting endpoints of one replica.

    root: the model's directory. document: the OpenAPI document, as JSON.
    """

    def __init__(
        self,
        context: ApiContext,
        metrics_page: MetricsPage,
        live: LivePage | None,
        *,
        root: str,
        document: bytes,
    ) -> None:
        self._context = context
        self._client = context.client
        self._metrics_page = metrics_page
        self._live = live
        self._root = root
        self._document = document
        self._created = int(time.time())

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
        """GET /health, GET or POST /ping: 200 from the engine's first completed step until it dies
        or the server begins to stop, else 503."""
        if not self._client.healthy:
            raise unavailable(self._client)
        ready, records = self._client.ready, None
        if ready is not None and ready.engine:
            records = RecordAddress(ready.engine, ready.transfer_host, ready.transfer_port)
        role = self._client.role or ""
        return json_response(Health("ok", self._context.response_tag, role, records))

    async def metrics(self, _: Request) -> Response:
        """GET /metrics"""
        return Response(
            self._metrics_page.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def load(self, request: Request) -> Response:
        """GET /load"""
        cursor = request.query_params.get("prefixes_since")
        if not client_of(request.scope).reads_prefixes:
            cursor = None
        prefixes = None if cursor is None else self._client.prefix_reporter.report(cursor)
        requests = self._client.open_requests
        since = request.query_params.get("samples_since", "")
        asked = self._live is not None and since.isdecimal()
        samples = self._live.samples_since(int(since)) if self._live and asked else []
        tokens, role = self._client.open_tokens, self._client.role
        return json_response(Load(requests, tokens, requests, prefixes, role, samples))

    async def version(self, _: Request) -> Response:
        """GET /version"""
        return json_response(Version(__version__))

    async def openapi(self, _: Request) -> Response:
        """GET /openapi.json"""
        return Response(self._document, media_type="application/json")
