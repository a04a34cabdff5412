"""The OpenAPI document, written from the message types themselves."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import msgspec

from millrace import __version__
from millrace.server.answers import (
    ChatCompletion,
    Completion,
    Health,
    ModelCard,
    ModelList,
    Version,
)
from millrace.server.errors import ErrorBody
from millrace.server.schema import ChatRequest, CompletionRequest

# (path, method, what it does, body, answer; None is plain text)
_OPERATIONS: tuple[tuple[str, str, str, type | None, type | None], ...] = (
    ("/v1/chat/completions", "post", "Continue a chat", ChatRequest, ChatCompletion),
    ("/v1/completions", "post", "Continue a text", CompletionRequest, Completion),
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


def _operation(path: str, summary: str, body: Any, answer: Any, error: Any) -> dict[str, Any]:
    plain = {"text/plain": {"schema": {"type": "string"}}}
    content = _json(answer) if answer else plain
    if body:
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
