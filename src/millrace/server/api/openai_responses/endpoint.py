"""/v1/responses: OpenAI's newer API over the same engine.

A body becomes a chat body (`items`), and a stored response goes on where it ended (`store`). The
format of the answer is in `formatter`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message

from millrace.errors import RequestError
from millrace.lengths import ContextLengthError
from millrace.protocol import Ready
from millrace.response_ids import OWNER_HEADER
from millrace.server.api.chat.endpoint import PreparedChat, count_chat_tokens, respond_to_chat
from millrace.server.api.context import ApiContext
from millrace.server.api.field_table import counting_rules
from millrace.server.api.fields import naming_fields
from millrace.server.api.generation import Generations
from millrace.server.api.openai_responses.background import BackgroundRun, EventStream
from millrace.server.api.openai_responses.fitting import prepare_fitting
from millrace.server.api.openai_responses.formatter import ResponseFormatter
from millrace.server.api.openai_responses.items import Item, as_chat, input_items
from millrace.server.api.openai_responses.listing import item_list
from millrace.server.api.openai_responses.request import (
    NAMES,
    RULES,
    Deleted,
    InputTokens,
    ResponsesRequest,
    check_body,
    shown_logprobs,
)
from millrace.server.api.openai_responses.response_body import RawMessage, ResponseBody
from millrace.server.api.openai_responses.store import ResponseStore, StoredResponse
from millrace.server.api.openai_responses.token_logprobs import TextLogprobs
from millrace.server.api.openai_responses.tools import OfferedTool
from millrace.server.api.transport import json_response, stream_response
from millrace.server.http.access import client_of
from millrace.server.http.errors import as_api_error
from millrace.text.answer_parser import AnswerParser
from millrace.text.messages import is_long

_encode = msgspec.json.Encoder().encode


class Responses:
    """The endpoints. gauges: figures of the store, as `MetricsPage` shows them."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._store = ResponseStore(context.max_stored_responses, context.max_stored_bytes)
        context.response_tag = self._store.tag if self._store.enabled else ""
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "stored_responses": (
                "Responses that are kept for later requests.", lambda: len(self._store)
            ),
            "stored_response_bytes": ("Bytes that they count.", lambda: self._store.bytes),
        }  # fmt: skip

    async def create(self, request: Request) -> ASGIApp:
        """POST /v1/responses"""
        context = self._context
        body, prefix_hashes = await context.read_prompt_body(request, ResponsesRequest, RULES)
        ready = context.check_ready(body)
        check_body(body)
        owner = _owner(request)
        items = self._items(body, owner)
        chat, offered = await context.run_in_thread(partial(as_chat, body, items), is_long(items))
        id = self._store.new_id()
        try:
            with naming_fields(NAMES):
                prepared = await prepare_fitting(
                    context, chat, id, ready, truncates=body.truncation == "auto"
                )
        except ContextLengthError as error:
            if not body.stream:
                raise
            # Codex finds this error in no other place than an event of the stream.
            formatter = self._formatter(id, body, None, {})
            return stream_response(formatter.refusal_events(as_api_error(error)))
        formatter = self._formatter(id, body, prepared, offered)
        if body.background:
            return self._begin(body, prepared, formatter, ready, prefix_hashes, owner, items)
        if formatter.body.store:
            formatter.on_end = partial(self._keep, owner, items)
        return respond_to_chat(context, body, prepared, formatter, ready, prefix_hashes)

    async def count(self, request: Request) -> ASGIApp:
        """POST /v1/responses/input_tokens; the input may be longer than the context"""
        context = self._context
        body = await context.body(request, ResponsesRequest, counting_rules("responses"))
        ready = context.check_ready(body)
        chat, _ = as_chat(body, self._items(body, _owner(request)))
        tokens = await count_chat_tokens(context, chat, ready)
        return json_response(InputTokens(input_tokens=tokens))

    async def retrieve(self, request: Request) -> ASGIApp:
        """GET /v1/responses/ID, also as a stream of events."""
        found = self._found(request)
        query = request.query_params
        if query.get("stream", "").lower() not in ("true", "1"):
            return Response(found.body, media_type="application/json")
        start = _starting_after(query.get("starting_after")) + 1
        if found.run is None:
            raise RequestError(
                "this response has no stream to read: it was not created with background: true; "
                "leave out stream",
                param="stream",
            )
        found.run.check_start(start)
        return EventStream(found.run, start)

    async def delete(self, request: Request) -> ASGIApp:
        """DELETE /v1/responses/ID; what runs in the background ends."""
        found = self._found(request)
        self._store.delete(found.id, found.owner)
        if found.run is not None and found.running:
            await found.run.cancel()
        return json_response(Deleted(id=found.id))

    async def cancel(self, request: Request) -> ASGIApp:
        """POST /v1/responses/ID/cancel"""
        found = self._found(request)
        if found.run is None:
            raise RequestError(
                "Cannot cancel a synchronous response. Only one that was created with background: "
                "true can be cancelled; close the connection of another one"
            )
        if found.running:
            await found.run.cancel()
        return Response(found.body, media_type="application/json")

    async def input_items(self, request: Request) -> ASGIApp:
        """GET /v1/responses/ID/input_items"""
        return json_response(item_list(self._found(request), request.query_params))

    def _found(self, request: Request) -> StoredResponse:
        return self._store.get(request.path_params["id"], _owner(request))

    def _items(self, body: ResponsesRequest, owner: str) -> list[Item]:
        """All items of the conversation. Raises RequestError."""
        items: list[Item] = []
        if body.previous_response_id is not None:
            items += self._store.previous(body.previous_response_id, owner).items()
        for item in input_items(body.input):
            if item.get("type") == "item_reference":
                item = self._store.output_item(str(item.get("id")), owner)
            items.append(item)
        return items

    def _formatter(
        self,
        id: str,
        body: ResponsesRequest,
        prepared: PreparedChat | None,
        tools: dict[str, OfferedTool],
    ) -> ResponseFormatter:
        """What formats the answer to a chat, or the error where there is none."""
        context = self._context
        logprobs = None
        if shown_logprobs(body) is not None:
            logprobs = TextLogprobs(context.processor.tokenizer)
        header, decode = self._header(id, body, prepared), None
        if body.enable_response_messages and prepared is not None:
            shown = RawMessage(message=prepared.text, tokens=prepared.requests[0].prompt)
            header = msgspec.structs.replace(header, input_messages=[shown])
            decode = partial(context.processor.tokenizer.decode, skip_special_tokens=False)
        return ResponseFormatter(
            header,
            AnswerParser(None, None) if prepared is None else prepared.parsers[0],
            item_tag=self._store.tag,
            tools=tools,
            logprobs=logprobs,
            shows_reasoning=body.include_reasoning,
            decode=decode,
        )

    def _header(
        self, id: str, body: ResponsesRequest, prepared: PreparedChat | None
    ) -> ResponseBody:
        """What the answer repeats of the request."""
        context = self._context
        sampling = context.processor.defaults if prepared is None else prepared.params
        return ResponseBody(
            id=id,
            created_at=int(time.time()),
            model=context.model_name(body),
            background=bool(body.background),
            instructions=body.instructions,
            previous_response_id=body.previous_response_id,
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=body.max_tool_calls,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            reasoning=body.reasoning,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_logprobs=body.top_logprobs or 0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            text=body.text or {"format": {"type": "text"}},
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            truncation=body.truncation or "disabled",
            store=body.store is not False and self._store.enabled,
            prompt_cache_key=body.prompt_cache_key,
            safety_identifier=body.safety_identifier,
            user=body.user,
        )

    def _keep(self, owner: str, items: Sequence[Item], body: ResponseBody) -> None:
        """Store an answer that has ended well."""
        if body.status in ("completed", "incomplete"):
            self._store.add(StoredResponse(owner, [_encode(item) for item in items], body))

    def _begin(
        self,
        body: ResponsesRequest,
        prepared: PreparedChat,
        formatter: ResponseFormatter,
        ready: Ready,
        prefix_hashes: Sequence[int],
        owner: str,
        items: Sequence[Item],
    ) -> ASGIApp:
        """Run a response in the background. Raises RequestError or ApiError if it cannot begin."""
        if not formatter.body.store:
            raise RequestError(
                "background needs stored responses, which this server does not keep "
                "(--max-stored-responses 0)",
                param="background",
            )

        def open_generations() -> Generations:
            return self._context.open_generations(
                prepared.requests, prepared.params, ready, _never, prefix_hashes,
                stream_interval=body.stream_interval if body.stream else None,
                reasons=prepared.reasons,
            )  # fmt: skip

        run = BackgroundRun(open_generations, formatter, keeps_events=bool(body.stream))
        stored = StoredResponse(owner, [_encode(item) for item in items], formatter.body, run)
        self._store.add(stored)
        try:
            run.start()
        except BaseException:
            self._store.delete(stored.id, owner)
            raise
        formatter.on_end = stored.settle
        run.on_change = partial(self._store.resize, stored)
        if body.stream:
            return EventStream(run, 0)
        return Response(stored.body, media_type="application/json")


def _owner(request: Request) -> str:
    """Whose responses a request may use: of its API key, and of whom its gateway names."""
    named = request.headers.get(OWNER_HEADER, "")
    return f"{client_of(request.scope).owner}.{named}"


def _starting_after(given: str | None) -> int:
    """The number of the last event that the client has; -1: none."""
    if given is None:
        return -1
    if not given.isascii() or not given.isdigit() or len(given) > 9:
        raise RequestError(
            f"starting_after must be the number of an event, got {given[:20]!r}",
            param="starting_after",
        )
    return int(given)


async def _never() -> Message:
    """No client is waited for that could go."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError
