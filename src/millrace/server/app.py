"""The HTTP application: which path does what.

A request is read, checked and turned into engine requests here; the answer's way out is
`responses`. It knows the engine only through `EngineClient`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from uuid import uuid4

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive

from millrace import __version__
from millrace.errors import RequestError
from millrace.protocol import AddRequest, Ready, SamplingParams
from millrace.server.engine_client import EngineClient, EngineDeadError
from millrace.server.errors import ApiError, error_response
from millrace.server.fields import parse_body, sampling_params
from millrace.server.generation import Generations
from millrace.server.http import RequestIds, read_body
from millrace.server.metrics import MetricsPage, RequestMetrics
from millrace.server.openapi import openapi_document
from millrace.server.prompts import Prompt, split_prompts
from millrace.server.replies import ChatReply, CompletionReply, Reply
from millrace.server.responses import EventStream, WholeAnswer, json_response
from millrace.server.schema import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Health,
    ModelCard,
    ModelList,
    Version,
)
from millrace.text.codec import Codec
from millrace.text.reasoning import ReasoningParser, ReasoningSplit, begins_reasoning

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; a chat takes what fits
LONG_TEXT = 2000  # characters; longer texts are tokenised beside the event loop


class Api:
    """The endpoints of one replica.

    names: what the model may be called, the first being its name in answers. root: its directory.
    reasoning_parser: how chats are split into reasoning and content.
    max_queue: requests that may wait beyond those that the engine runs at once.
    """

    def __init__(
        self,
        client: EngineClient,
        codec: Codec,
        metrics: RequestMetrics,
        *,
        names: Sequence[str],
        root: str,
        reasoning_parser: ReasoningParser,
        max_queue: int,
        max_body_bytes: int,
    ) -> None:
        self._client = client
        self._codec = codec
        self._metrics = metrics
        self._page = MetricsPage(names[0], metrics, lambda: client.stats)
        self._names = names
        self._root = root
        self._reasoning_parser = reasoning_parser
        self._max_queue = max_queue
        self._max_body_bytes = max_body_bytes
        self._created = int(time.time())
        self._tokenising = ThreadPoolExecutor(1, thread_name_prefix="tokenise")

    def application(self) -> ASGIApp:
        """The ASGI application."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/health", self.health),
            Route("/metrics", self.metrics_page),
            Route("/version", self.version),
            Route("/openapi.json", self.openapi),
        ]
        kinds = (ApiError, RequestError, EngineDeadError, HTTPException, Exception)
        handlers = dict.fromkeys(kinds, error_response)
        return RequestIds(Starlette(routes=routes, exception_handlers=handlers))

    # --- generation ----------------------------------------------------------------------------

    async def completions(self, request: Request) -> ASGIApp:
        """POST /v1/completions"""
        body = parse_body(await read_body(request, self._max_body_bytes), CompletionRequest)
        ready = self._check(body)
        params = sampling_params(body, self._codec.defaults)
        prompts = split_prompts(body.prompt)
        self._check_room(len(prompts), ready)
        unsaid = None if body.max_tokens is None else COMPLETION_MAX_TOKENS
        reply = CompletionReply(
            f"cmpl-{uuid4().hex}", int(time.time()), self._name(body), bool(body.return_token_ids)
        )
        requests = [
            self._codec.request(
                f"{reply.id}-{index}",
                await self._token_ids(prompt, body.add_special_tokens),
                params,
                ready.max_model_len,
                unsaid,
            )
            for index, prompt in enumerate(prompts)
        ]
        return self._answer(body, requests, params, reply, ready)

    async def chat(self, request: Request) -> ASGIApp:
        """POST /v1/chat/completions"""
        body = parse_body(await read_body(request, self._max_body_bytes), ChatRequest)
        ready = self._check(body)
        params = sampling_params(body, self._codec.defaults)
        self._check_room(1, ready)
        text = self._codec.chat_prompt(
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            variables=body.chat_template_kwargs,
        )
        thinks = begins_reasoning(self._reasoning_parser, text, body.chat_template_kwargs)
        reply = ChatReply(
            f"chatcmpl-{uuid4().hex}",
            int(time.time()),
            self._name(body),
            bool(body.return_token_ids),
            ReasoningSplit() if thinks else None,
        )
        token_ids = await self._token_ids(text, add_special_tokens=False)
        engine_request = self._codec.request(reply.id, token_ids, params, ready.max_model_len)
        return self._answer(body, [engine_request], params, reply, ready)

    def _answer(
        self,
        body: GenerationRequest,
        requests: list[AddRequest],
        params: SamplingParams,
        reply: Reply,
        ready: Ready,
    ) -> ASGIApp:
        def open_all(receive: Receive) -> Generations:
            self._check_room(len(requests), ready)  # again: tokenising took its time
            pairs = [(one, self._codec.output(params)) for one in requests]
            return Generations(self._client, pairs, receive)

        if body.stream:
            return EventStream(open_all, reply, body.stream_options)
        return WholeAnswer(open_all, reply)

    async def _token_ids(self, prompt: Prompt, add_special_tokens: bool) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        encode = partial(self._codec.encode, prompt, add_special_tokens)
        if len(prompt) < LONG_TEXT:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._tokenising, encode)

    def _check(self, body: GenerationRequest) -> Ready:
        """What the engine said when it was ready. Raises ApiError: not ready, or not this model."""
        if body.model:
            self._check_name(body.model)
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")
        if self._client.ready is None or not self._client.healthy:
            raise _unavailable(self._client)
        return self._client.ready

    def _check_name(self, name: str) -> None:
        if name not in self._names:
            raise ApiError(
                404,
                f"model {name!r} is not served here; {' or '.join(self._names)} is",
                param="model",
                code="model_not_found",
            )

    def _check_room(self, count: int, ready: Ready) -> None:
        """Raise ApiError unless `count` more requests may run or wait."""
        limit = ready.max_num_seqs + self._max_queue
        if count > limit:
            raise RequestError(
                f"{count} prompts in one request; at most {limit} work", param="prompt"
            )
        if self._client.open_requests + count > limit:
            self._metrics.rejected += count
            raise ApiError(
                429,
                f"the queue is full: {self._client.open_requests} requests are open, {limit} may "
                f"be ({ready.max_num_seqs} running, {self._max_queue} waiting); try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    def _name(self, body: GenerationRequest) -> str:
        return body.model or self._names[0]

    # --- everything else -----------------------------------------------------------------------

    async def models(self, _: Request) -> Response:
        """GET /v1/models"""
        return json_response(ModelList(data=[self._card(name) for name in self._names]))

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME"""
        name = request.path_params["name"]
        self._check_name(name)
        return json_response(self._card(name))

    def _card(self, name: str) -> ModelCard:
        ready = self._client.ready
        return ModelCard(
            id=name,
            created=self._created,
            root=self._root,
            max_model_len=ready.max_model_len if ready else None,
            vocab_size=self._codec.vocab_size,
        )

    async def health(self, _: Request) -> Response:
        """GET /health: 200 once the engine has completed a real step, while it lives."""
        if not self._client.healthy:
            raise _unavailable(self._client)
        return json_response(Health("ok"))

    async def metrics_page(self, _: Request) -> Response:
        """GET /metrics"""
        return Response(self._page.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, _: Request) -> Response:
        """GET /version"""
        return json_response(Version(__version__))

    async def openapi(self, _: Request) -> Response:
        """GET /openapi.json"""
        return Response(openapi_document(), media_type="application/json")


def _unavailable(client: EngineClient) -> ApiError:
    if client.died is not None:
        return ApiError(503, f"the engine is gone: {client.died}", code="engine_dead")
    if client.ready is None:
        return ApiError(
            503, "the engine is loading", code="engine_loading", headers={"Retry-After": "2"}
        )
    return ApiError(503, "the server is shutting down", code="shutting_down")
