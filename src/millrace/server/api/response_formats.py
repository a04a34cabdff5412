"""`response_format` in the shapes that servers have it in, as fields of structured_outputs.

OpenAI has text, json_object and json_schema, vLLM structural_tag beside them. llama.cpp, Together
and Fireworks write a schema beside the type, also of json_object; TGI calls it `value`, and has
json and regex as types. What a schema means is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from millrace.errors import RequestError
from millrace.text.tools.schema_dialects import Strictness

_KINDS = ("text", "json_object", "json_schema", "structural_tag", "regex", "grammar")
_KNOWN = {"type", "json_schema", "schema", "value", "strict", "name", "description"}
_ANYTHING = {"type": ["object", "array", "string", "number", "boolean", "null"]}


def wanted_output(
    given: dict[str, Any] | None, note_unknown: Callable[[str], None]
) -> dict[str, Any] | None:
    """What a response_format asks for; None if nothing. note_unknown: gets the name of each field
    in it that nobody knows. Raises RequestError."""
    kind = (given or {}).get("type")
    if given is None or kind == "text":
        return None
    if kind == "structural_tag":
        return {"structural_tag": given}
    if kind in ("regex", "grammar"):
        return {kind: _expression(given, kind, note_unknown)}
    if kind not in ("json_object", "json_schema", "json"):
        known = f"{', '.join(_KINDS[:-1])} or {_KINDS[-1]}"
        raise _wrong(f"response_format.type must be {known}, got {kind!r:.60}")
    schema = _schema(given, note_unknown)
    if kind != "json_schema" and schema is None:
        return {"json_object": True}
    if not isinstance(schema, dict):
        raise _wrong("response_format.json_schema.schema must be a JSON schema, an object")
    if kind == "json_object":
        return {"json": {"type": "object", **schema}}
    return {"json": schema or _ANYTHING}


def strictness(given: dict[str, Any] | None) -> Strictness:
    """How the schema of a response_format is bound; what has no `strict` is plain. Raises
    RequestError."""
    given = given or {}
    described = given.get("json_schema")
    strict = described.get("strict") if isinstance(described, dict) else None
    strict = given.get("strict") if strict is None else strict
    if strict not in (None, True, False):
        raise _wrong(
            f"response_format.json_schema.strict must be true or false, got {strict!r:.60}"
        )
    return "plain" if strict is None else "strict" if strict else "lenient"


def _schema(given: dict[str, Any], note_unknown: Callable[[str], None]) -> Any:
    """The schema, wherever it stands; None if there is none. A text is read as JSON."""
    described = given.get("json_schema")
    inner = described if isinstance(described, dict) else {}
    for name in sorted([*(given.keys() - _KNOWN), *(inner.keys() - _KNOWN)]):
        note_unknown(name)
    places = (inner.get("schema"), given.get("schema"), given.get("value"))
    schema = next((one for one in places if one is not None), None)
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"response_format: the schema is not valid JSON: {error}") from None


def _expression(given: dict[str, Any], kind: str, note_unknown: Callable[[str], None]) -> str:
    names = {"regex": ("pattern", "regex", "value"), "grammar": ("grammar", "value")}[kind]
    for name in sorted(given.keys() - {"type", *names}):
        note_unknown(name)
    found = next((given[name] for name in names if given.get(name) is not None), None)
    if not isinstance(found, str):
        raise _wrong(f"response_format.{names[0]} must be a text")
    return found


def _wrong(message: str) -> RequestError:
    return RequestError(message, param="response_format")
