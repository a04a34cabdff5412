"""A client's JSON schema as the matcher reads it: without what says nothing, in one dialect.

Schemas come from many generators (pydantic, zod, OpenAPI). They hold annotations, keywords with a
value that allows everything, and keywords that others of the matcher's say as well. What is left
means the same. Knows no tool and no grammar; which keywords the matcher has is known there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from millrace.text.tools.json_schema import DEFINITIONS, resolve
from millrace.text.tools.text_patterns import FORMATS

Strictness = Literal["strict", "plain", "lenient"]
"""strict: the client said so, and what cannot be bound is refused, unknown formats too. plain: it
said nothing; an unknown format is an annotation, as JSON Schema has it. lenient: it said `strict:
false`, and what cannot be bound binds nothing."""

_ONE = (
    "items", "additionalItems", "additionalProperties", "not", "contains", "propertyNames", "if",
    "then", "else", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_EVERYTHING: tuple[Any, ...] = (True, {})
_DIALECT = re.compile(r"https?://json-schema\.org/(draft-0[3467]|draft/20(?:19-09|20-12))/schema#?")
_UNANCHORED = "://json-schema.org/"


def read_schema(schema: Any, strictness: Strictness) -> Any:
    """The schema without what says nothing. Its depth is bounded by `schema_limit_error`."""
    return _read(schema, strictness, schema)


def _read(schema: Any, strictness: Strictness, root: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found = {key: _part(key, value, strictness, root) for key, value in schema.items()}
    _read_dialect(found)
    _read_reference(found)
    _read_bounds(found)
    _drop_neutral(found)
    _read_names(found, root)
    _read_plain_patterns(found)
    form = found.get("format")
    if strictness != "strict" and isinstance(form, str) and form not in FORMATS:
        del found["format"]
    return found


def _part(key: str, value: Any, strictness: Strictness, root: Any) -> Any:
    if key in _NAMED and isinstance(value, Mapping):
        return {name: _read(part, strictness, root) for name, part in value.items()}
    if key in _LISTED and isinstance(value, list):
        return [_read(part, strictness, root) for part in value]
    if key in _ONE:
        return _read(value, strictness, root)
    return value


def _read_dialect(schema: dict[str, Any]) -> None:
    """`$schema` under the name that the matcher has; dropped where it names another language."""
    if "$schema" not in schema:
        return
    known = _DIALECT.fullmatch(str(schema["$schema"]))
    if known is None:
        del schema["$schema"]
        return
    scheme = "https" if known[1].startswith("draft/") else "http"
    schema["$schema"] = f"{scheme}{_UNANCHORED}{known[1]}/schema"


def _read_reference(schema: dict[str, Any]) -> None:
    """A `$ref` to a definition whose `#` is missing, as LiteLLM sends it to Anthropic's API."""
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith(
        tuple(f"/{one}/" for one in DEFINITIONS)
    ):
        schema["$ref"] = f"#{reference}"


def _read_bounds(schema: dict[str, Any]) -> None:
    """`exclusiveMinimum: true` beside `minimum`, as draft 4 and OpenAPI 3.0 have it."""
    for key, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(schema.get(exclusive), bool) and schema.pop(exclusive) and key in schema:
            schema[exclusive] = schema.pop(key)


def _drop_neutral(schema: dict[str, Any]) -> None:
    """Keywords whose value allows everything."""
    if schema.get("uniqueItems") is False or schema.get("maxItems") in (0, 1):
        schema.pop("uniqueItems", None)
    if schema.get("contains") is None or (
        schema.get("minContains") == 0 and "maxContains" not in schema
    ):
        for key in ("contains", "minContains", "maxContains"):
            schema.pop(key, None)
    if "if" not in schema or not schema.keys() & {"then", "else"}:
        for key in ("if", "then", "else"):
            schema.pop(key, None)
    for key in ("unevaluatedItems", "unevaluatedProperties", "propertyNames"):
        if schema.get(key) in _EVERYTHING:
            del schema[key]
    for key in ("dependentRequired", "dependentSchemas", "dependencies"):
        if schema.get(key) == {}:
            del schema[key]
    if schema.get("not") is False:
        del schema["not"]
    schema.pop("$dynamicAnchor", None)  # `$dynamicRef` is refused by its own name


_PLAIN_NAME = re.compile(r"\^([\w -]+)\$")


def _read_plain_patterns(schema: dict[str, Any]) -> None:
    """Patterns that only one name matches, as properties. The matcher would else offer a further
    property behind the last one, though no name is left for it."""
    patterns = schema.get("patternProperties")
    if not isinstance(patterns, Mapping):
        return
    plain = {name: found[1] for name in patterns if (found := _PLAIN_NAME.fullmatch(name))}
    if not plain:
        return
    properties = dict(schema.get("properties") or {})
    for pattern, name in plain.items():
        part, own = patterns[pattern], properties.get(name, True)
        if own in _EVERYTHING or own == part:
            properties[name] = part
        elif part not in _EVERYTHING:
            properties[name] = {"allOf": [own, part]}
    schema["properties"] = properties
    rest = {name: part for name, part in patterns.items() if name not in plain}
    schema["patternProperties"] = rest
    if not rest:
        del schema["patternProperties"]


def closed_schema(schema: Any) -> Any:
    """The schema with objects that have no properties but those that it names."""
    if isinstance(schema, list):
        return [closed_schema(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {key: _closed_part(key, value) for key, value in schema.items()}
    if "properties" in found:
        found.setdefault("additionalProperties", False)
    return found


def _closed_part(key: str, value: Any) -> Any:
    if key in _NAMED and isinstance(value, Mapping):
        return {name: closed_schema(part) for name, part in value.items()}
    return closed_schema(value) if key in (*_ONE, *_LISTED) else value


def _read_names(schema: dict[str, Any], root: Any) -> None:
    """`propertyNames` of a map, as properties or patternProperties."""
    names = schema.get("propertyNames")
    if isinstance(names, dict) and isinstance(names.get("$ref"), str) and len(names) == 1:
        names = resolve(names["$ref"], root)
    if not isinstance(names, Mapping):
        return
    words = names.keys() - {"title", "description"}
    if names.get("type", "string") == "string":
        words -= {"type"}
    if not words:
        del schema["propertyNames"]
        return
    if schema.keys() & {"properties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf"}:
        return
    values = schema.get("additionalProperties", True)
    listed = names.get("enum")
    if words == {"enum"} and isinstance(listed, list) and all(type(one) is str for one in listed):
        schema["properties"] = dict.fromkeys(listed, values)
    elif words == {"pattern"} and isinstance(names["pattern"], str):
        schema["patternProperties"] = {names["pattern"]: values}
    else:
        return
    schema["additionalProperties"] = False
    del schema["propertyNames"]


def without_patterns(schema: Any, compiles: Callable[[str], bool]) -> Any:
    """The schema without the patterns that the matcher cannot read: they bind nothing."""
    if isinstance(schema, list):
        return [without_patterns(part, compiles) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for key in (*_ONE, *_LISTED):
        if isinstance(found.get(key), (Mapping, list)):
            found[key] = without_patterns(found[key], compiles)
    for key in _NAMED:
        if isinstance(found.get(key), Mapping):
            parts = found[key].items()
            found[key] = {name: without_patterns(part, compiles) for name, part in parts}
    if isinstance(found.get("pattern"), str) and not compiles(found["pattern"]):
        del found["pattern"]
    patterns = found.get("patternProperties")
    if isinstance(patterns, Mapping):
        found["patternProperties"] = {
            name: part for name, part in patterns.items() if compiles(name)
        }
        if len(found["patternProperties"]) < len(patterns):
            found.pop("additionalProperties", None)  # it may have been meant for the other names
    return found
