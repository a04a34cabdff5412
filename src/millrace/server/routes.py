"""Every endpoint of the server, in one table: path, method, what it does, its body and its answer.

The application's routes and the OpenAPI document are both made from this table, so that neither
can hold what the other lacks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.types import ASGIApp

from millrace.batch.jobs.objects import BatchObject, FileObject, NewBatch, Page
from millrace.batch.jobs.objects import Deleted as DeletedFile
from millrace.server.api.anthropic.endpoint import (
    Anthropic,
    CountRequest,
    MessagesRequest,
    TokenCount,
)
from millrace.server.api.anthropic.formatter import Message
from millrace.server.api.batches.endpoint import Batches
from millrace.server.api.cache_explain import CachedRequests, CacheExplain, Explanation
from millrace.server.api.chat.endpoint import Chat
from millrace.server.api.completions.endpoint import Completions
from millrace.server.api.management import (
    Done,
    IsPaused,
    IsSleeping,
    Management,
    PauseState,
    SleepState,
    WakeState,
)
from millrace.server.api.openai_responses.endpoint import Responses
from millrace.server.api.openai_responses.listing import ItemList
from millrace.server.api.openai_responses.request import (
    Deleted,
    InputTokens,
    ResponsesRequest,
)
from millrace.server.api.openai_responses.response_body import ResponseBody
from millrace.server.api.pages import Load, Pages
from millrace.server.api.request_schema import (
    BatchChatRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from millrace.server.api.response_schema import (
    ChatCompletion,
    Completion,
    Health,
    ModelCard,
    ModelList,
    Text,
    Tokens,
    Version,
)
from millrace.server.api.tokenize.endpoint import Tokenize


class ApiRoute(NamedTuple):
    """One path. family: the class whose instance serves it; handler: that class's method.

    body: the type of the request's JSON, None where it has none. answer: the type of the answer's
    JSON, a tuple where there are several, None for plain text. query: names of the query's
    parameters. manages: it changes what the engine does, so a server offers it only with
    --admin-key, whose key it needs, or with --debug.
    """

    path: str
    methods: tuple[str, ...]
    summary: str
    family: type[Any]
    handler: Callable[[Any, Request], Awaitable[ASGIApp]]
    body: Any = None
    answer: Any = None
    query: tuple[str, ...] = ()
    manages: bool = False


_GET, _POST = ("GET",), ("POST",)

ROUTES: tuple[ApiRoute, ...] = (
    ApiRoute(
        "/v1/chat/completions", _POST, "Continue a chat",
        Chat, Chat.create, ChatRequest, ChatCompletion,
    ),
    ApiRoute(
        "/v1/chat/completions/batch", _POST, "Continue several chats",
        Chat, Chat.create_batch, BatchChatRequest, ChatCompletion,
    ),
    ApiRoute(
        "/v1/completions", _POST, "Continue a text",
        Completions, Completions.create, CompletionRequest, Completion,
    ),
    ApiRoute(
        "/v1/responses", _POST, "Answer an input",
        Responses, Responses.create, ResponsesRequest, ResponseBody,
    ),
    ApiRoute(
        "/v1/responses/input_tokens", _POST, "Count an input's tokens",
        Responses, Responses.count, ResponsesRequest, InputTokens,
    ),
    ApiRoute(
        "/v1/responses/{id}", _GET, "A stored response, or its stream",
        Responses, Responses.retrieve, answer=ResponseBody, query=("stream", "starting_after"),
    ),
    ApiRoute(
        "/v1/responses/{id}", ("DELETE",), "Forget a stored response",
        Responses, Responses.delete, answer=Deleted,
    ),
    ApiRoute(
        "/v1/responses/{id}/cancel", _POST, "End a response that runs in the background",
        Responses, Responses.cancel, answer=ResponseBody,
    ),
    ApiRoute(
        "/v1/responses/{id}/input_items", _GET, "What a stored response was an answer to",
        Responses, Responses.input_items, answer=ItemList, query=("limit", "order", "after"),
    ),
    ApiRoute(
        "/v1/messages", _POST, "Continue a chat, in Anthropic's format",
        Anthropic, Anthropic.create, MessagesRequest, Message,
    ),
    ApiRoute(
        "/v1/messages/count_tokens", _POST, "Count a chat's tokens",
        Anthropic, Anthropic.count, CountRequest, TokenCount,
    ),
    ApiRoute(
        "/v1/files", _POST, "Upload a file", Batches, Batches.answer, answer=FileObject,
    ),
    ApiRoute(
        "/v1/files", _GET, "The files that are kept", Batches, Batches.answer, answer=Page,
        query=("purpose", "limit", "order", "after"),
    ),
    ApiRoute(
        "/v1/files/{id}", _GET, "A file", Batches, Batches.answer, answer=FileObject
    ),
    ApiRoute(
        "/v1/files/{id}", ("DELETE",), "Delete a file", Batches, Batches.answer,
        answer=DeletedFile,
    ),
    ApiRoute("/v1/files/{id}/content", _GET, "A file's content", Batches, Batches.answer),
    ApiRoute(
        "/v1/batches", _POST, "Answer every request of a file", Batches, Batches.answer,
        NewBatch, BatchObject,
    ),
    ApiRoute(
        "/v1/batches", _GET, "The batches", Batches, Batches.answer, answer=Page,
        query=("limit", "after"),
    ),
    ApiRoute(
        "/v1/batches/{id}", _GET, "A batch", Batches, Batches.answer, answer=BatchObject
    ),
    ApiRoute(
        "/v1/batches/{id}/cancel", _POST, "End a batch", Batches, Batches.answer,
        answer=BatchObject,
    ),
    ApiRoute(
        "/tokenize", _POST, "A prompt's tokens",
        Tokenize, Tokenize.tokenize, TokenizeRequest, Tokens,
    ),
    ApiRoute(
        "/detokenize", _POST, "The text of tokens",
        Tokenize, Tokenize.detokenize, DetokenizeRequest, Text,
    ),
    ApiRoute(
        "/tokenizer_info", _GET, "The tokenizer's configuration and the chat template",
        Tokenize, Tokenize.info, answer=dict[str, Any],
    ),
    ApiRoute(
        "/v1/models", _GET, "The model that is served", Pages, Pages.models, answer=ModelList
    ),
    ApiRoute(
        "/v1/models/{name:path}", _GET, "One name of it", Pages, Pages.model, answer=ModelCard
    ),
    ApiRoute(
        "/health", _GET, "Whether requests can be served", Pages, Pages.health, answer=Health
    ),
    ApiRoute(
        "/ping", ("GET", "POST"), "The same as /health", Pages, Pages.health, answer=Health
    ),
    ApiRoute("/metrics", _GET, "Figures for Prometheus", Pages, Pages.metrics),
    ApiRoute(
        "/load", _GET, "Open requests and their tokens, for gateways", Pages, Pages.load,
        answer=Load, query=("prefixes_since", "samples_since"),
    ),
    ApiRoute(
        "/cache/explain", _GET, "Why a request's prompt was not all in the prefix cache",
        CacheExplain, CacheExplain.explain,
        answer=(Explanation, CachedRequests), query=("request_id",),
    ),
    ApiRoute("/version", _GET, "Millrace's version", Pages, Pages.version, answer=Version),
    ApiRoute(
        "/openapi.json", _GET, "This document", Pages, Pages.openapi, answer=dict[str, Any]
    ),
    ApiRoute(
        "/reset_prefix_cache", _POST, "Forget every cached prefix that no running request holds",
        Management, Management.reset_prefix_cache, answer=Done, manages=True,
    ),
    ApiRoute(
        "/pause", _POST, "Serve nothing until /resume", Management, Management.pause,
        answer=PauseState, query=("mode", "clear_cache"), manages=True,
    ),
    ApiRoute(
        "/resume", _POST, "Serve again", Management, Management.resume,
        answer=PauseState, manages=True,
    ),
    ApiRoute(
        "/is_paused", _GET, "Whether nothing is served until /resume",
        Management, Management.is_paused, answer=IsPaused, manages=True,
    ),
    ApiRoute(
        "/sleep", _POST, "End the engine, which frees all of its memory",
        Management, Management.sleep, answer=SleepState, query=("level", "mode"), manages=True,
    ),
    ApiRoute(
        "/wake_up", _POST, "Start the engine again", Management, Management.wake_up,
        answer=WakeState, query=("tags",), manages=True,
    ),
    ApiRoute(
        "/is_sleeping", _GET, "Whether the engine sleeps", Management, Management.is_sleeping,
        answer=IsSleeping, manages=True,
    ),
)  # fmt: skip

_POOLING = (
    "this server generates text only; an embedding or ranking model, served by `vllm serve` or "
    "Text Embeddings Inference, has this endpoint"
)
_SPEECH = (
    "this server reads and writes text only; a speech model, such as Whisper under `vllm serve`, "
    "has this endpoint"
)
_CODE = "code and weights are not changed while the server runs; start it again"
_ADAPTERS = "adapters are not served; merge the adapter into the checkpoint"

# Endpoints of OpenAI's and vLLM's servers that are not here: why, and what has them.
ABSENT: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score"),
            *("/rerank", "/v1/rerank", "/v2/rerank"),
        ),
        _POOLING,
    ),
    **dict.fromkeys(
        ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech", "/v1/realtime"),
        _SPEECH,
    ),
    "/v1/images/generations": "this server reads and writes text only",
    "/v1/moderations": "this server generates text only",
    **dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter"), _ADAPTERS),
    **dict.fromkeys(
        ("/collective_rpc", "/init_weight_transfer_engine", "/update_weights", "/weight_checker"),
        _CODE,
    ),
}
