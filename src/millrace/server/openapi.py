"""The OpenAPI document, made from the table of routes and the types of their messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from millrace.common.api_errors import ErrorBody
from millrace.server.routes import ApiRoute
from millrace.version import __version__

_PATH_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_PLAIN_TEXT = {"text/plain": {"schema": {"type": "string"}}}


def openapi_document(routes: Sequence[ApiRoute]) -> bytes:
    """The document as JSON."""
    types = [kind for row in routes for kind in (row.body, *_answers(row)) if kind is not None]
    types.append(ErrorBody)
    schemas, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    schema_of = {id(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: dict[str, Any] = {}
    for row in routes:
        path = _PATH_PARAMETER.sub(r"{\1}", row.path)
        operation = _operation(row, schema_of)
        paths.setdefault(path, {}).update({one.lower(): operation for one in row.methods})
    document = {
        "openapi": "3.1.0",
        "info": {"title": "Millrace", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    return msgspec.json.encode(document)


def _operation(row: ApiRoute, schema_of: dict[int, Any]) -> dict[str, Any]:
    answers = [schema_of[id(kind)] for kind in _answers(row)]
    content = _json(answers[0] if len(answers) == 1 else {"anyOf": answers})
    if not answers:
        content = _PLAIN_TEXT
    if hasattr(row.body, "stream"):
        content = {**content, "text/event-stream": {"schema": {"type": "string"}}}
    failure = {"description": "Refused or failed", "content": _json(schema_of[id(ErrorBody)])}
    operation: dict[str, Any] = {
        "summary": row.summary,
        "parameters": [
            *(_parameter(name, "path") for name in _PATH_PARAMETER.findall(row.path)),
            *(_parameter(name, "query") for name in row.query),
        ],
        "responses": {"200": {"description": "Success", "content": content}, "default": failure},
    }
    if row.body is not None:
        operation["requestBody"] = {"required": True, "content": _json(schema_of[id(row.body)])}
    return operation


def _answers(row: ApiRoute) -> tuple[Any, ...]:
    if isinstance(row.answer, tuple):
        return row.answer
    return () if row.answer is None else (row.answer,)


def _parameter(name: str, place: str) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": {"type": "string"}}


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
