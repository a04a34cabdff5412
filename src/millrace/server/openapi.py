"""The OpenAPI document, written from the message types themselves."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import msgspec

from millrace.server.api.anthropic.endpoint import CountRequest, MessagesRequest, TokenCount
from millrace.server.api.anthropic.formatter import Message
from millrace.server.api.openai_responses.endpoint import ResponsesRequest
from millrace.server.api.openai_responses.formatter import ResponseBody
from millrace.server.api.request_schema import (
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
from millrace.server.http.errors import ErrorBody
from millrace.version import __version__

# (path, method, what it does, body, answer; None is plain text)
_OPERATIONS: tuple[tuple[str, str, str, type | None, type | None], ...] = (
    ("/v1/chat/completions", "post", "Continue a chat", ChatRequest, ChatCompletion),
    ("/v1/completions", "post", "Continue a text", CompletionRequest, Completion),
    ("/v1/responses", "post", "Answer an input", ResponsesRequest, ResponseBody),
    ("/v1/messages", "post", "Continue a chat, in Anthropic's words", MessagesRequest, Message),
    ("/v1/messages/count_tokens", "post", "Count a chat's tokens", CountRequest, TokenCount),
    ("/tokenize", "post", "A prompt's tokens", TokenizeRequest, Tokens),
    ("/detokenize", "post", "The text of tokens", DetokenizeRequest, Text),
    ("/v1/models", "get", "The model that is served", None, ModelList),
    ("/v1/models/{name}", "get", "One name of it", None, ModelCard),
    ("/health", "get", "Whether requests can be served", None, Health),
    ("/metrics", "get", "Figures for Prometheus", None, None),
    ("/version", "get", "Millrace's version", None, Version),
)


@cache
def openapi_document() -> bytes:
    """The document as JSON."""
    kinds = [kind for row in _OPERATIONS for kind in row[3:] if kind is not None]
    kinds.append(ErrorBody)
    schemas, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    by_kind = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, Any] = {}
    for path, method, summary, body, answer in _OPERATIONS:
        paths.setdefault(path, {})[method] = _operation(
            path,
            summary,
            by_kind[body] if body else None,
            by_kind[answer] if answer else None,
            by_kind[ErrorBody],
            streams=hasattr(body, "stream"),
        )
    document = {
        "openapi": "3.1.0",
        "info": {"title": "Millrace", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    return msgspec.json.encode(document)


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _operation(
    path: str, summary: str, body: Any, answer: Any, error: Any, streams: bool
) -> dict[str, Any]:
    plain = {"text/plain": {"schema": {"type": "string"}}}
    content = _json(answer) if answer else plain
    if streams:
        content = {**content, "text/event-stream": {"schema": {"type": "string"}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "parameters": [_path_parameter(name) for name in re.findall(r"{(\w+)}", path)],
        "responses": {
            "200": {"description": "Success", "content": content},
            "default": {"description": "Refused or failed", "content": _json(error)},
        },
    }
    if body:
        operation["requestBody"] = {"required": True, "content": _json(body)}
    return operation


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
