"""What is left of a schema means the same, and the matcher reads it."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import RequestError
from millrace.protocol import StructuredOutputs
from millrace.text.grammar import grammar_notes, output_grammar, readable, schema_error
from millrace.text.tools.json_schema import types_of
from millrace.text.tools.schema_dialects import Strictness, read_schema
from millrace.text.tools.text_patterns import FORMATS
from tests.text.test_grammar import accepts

# Keywords that generators write and that allow every value of the schema beside them.
SILENT: list[dict[str, Any]] = [
    {"title": "T", "description": "d", "default": {"format": "path"}, "examples": [1]},
    {"deprecated": True, "readOnly": False, "writeOnly": True, "$comment": "c"},
    {"contentMediaType": "text/html", "contentEncoding": "base64", "discriminator": {}},
    {"nullable": False, "x-order": 3, "example": {"uniqueItems": True}, "xml": {}},
    {"uniqueItems": False}, {"format": "path"}, {"format": "int64"}, {"format": "binary"},
    {"propertyNames": {}}, {"propertyNames": True}, {"propertyNames": {"type": "string"}},
    {"not": False}, {"contains": {"type": "null"}, "minContains": 0},
    {"if": {"type": "string"}}, {"dependentRequired": {}},
    {"unevaluatedProperties": True}, {"unevaluatedItems": {}}, {"$dynamicAnchor": "a"},
    {"$schema": "https://json-schema.org/draft/2020-12/schema#"},
]  # fmt: skip
LEAVES: list[Any] = [
    {"type": "integer", "minimum": 3}, {"type": "string", "maxLength": 2}, {"type": "boolean"},
    {"enum": ["a", None, 1]}, {"const": {"format": "path"}}, {"type": ["null", "number"]},
]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 9) | st.sampled_from(["", "a", "abc", "ab"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "format", "not"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Schemas of objects (with properties that are called like keywords), arrays and choices."""
    named = st.dictionaries(st.sampled_from(["a", "format", "not", "uniqueItems"]), inner)
    return (
        named.map(lambda parts: {"type": "object", "properties": parts})
        | inner.map(lambda part: {"type": "array", "items": part})
        | inner.map(lambda part: {"type": "object", "additionalProperties": part})
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts})
    )


def noisy(schema: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    more = st.lists(st.sampled_from(SILENT), max_size=4)
    return st.builds(
        lambda one, some: {k: v for d in (*some, one) for k, v in d.items()}, schema, more
    )


SCHEMAS = st.recursive(
    noisy(st.sampled_from(LEAVES)), lambda inner: noisy(nested(inner)), max_leaves=6
)


@given(schema=SCHEMAS, values=st.lists(VALUES, min_size=1, max_size=8))
def test_the_same_values_are_valid(schema: Any, values: list[Any]) -> None:
    given, read = (
        jsonschema_rs.validator_for(one) for one in (schema, read_schema(schema, "plain"))
    )
    for value in values:
        assert given.is_valid(value) == read.is_valid(value)


@given(schema=SCHEMAS)
def test_the_matcher_reads_what_binds_nothing(schema: Any) -> None:
    """Whatever a generator adds, the schema is served, and nothing of it is lost."""
    wanted = StructuredOutputs(json=schema)
    source = output_grammar(wanted, "response_format", False)
    assert grammar_notes(source) == ()


def names_of(names: Any, values: Any = True) -> dict[str, Any]:
    return {"type": "object", "propertyNames": names, "additionalProperties": values}


@pytest.mark.parametrize(
    "schema",
    [
        names_of({"enum": ["a", "b"]}, {"type": "integer"}),
        names_of({"type": "string", "enum": ["b"]}),
        names_of({"pattern": "^a+$"}, {"type": "integer"}),
        {"type": "object", "propertyNames": {"type": "string", "pattern": "a"}},
        {**names_of({"$ref": "#/$defs/n"}), "$defs": {"n": {"title": "N", "enum": ["aa", "b"]}}},
    ],
)
@given(value=st.dictionaries(st.sampled_from(["a", "b", "aa", "c"]), st.integers(0, 1) | st.none()))
def test_names_of_properties_are_bound(schema: Any, value: Any) -> None:
    read = read_schema(schema, "strict")
    valid = jsonschema_rs.validator_for(schema).is_valid(value)
    assert jsonschema_rs.validator_for(read).is_valid(value) == valid
    text = json.dumps({key: value[key] for key in sorted(value)})
    assert accepts(output_grammar(StructuredOutputs(json=schema), "f", False), text) == valid


def test_the_formats_that_are_bound_are_the_matchers() -> None:
    for form in FORMATS:
        assert not schema_error({"type": "string", "format": form})
        assert read_schema({"format": form}, "plain") == {"format": form}


@pytest.mark.parametrize(
    "dialect",
    [
        "http://json-schema.org/draft-07/schema#", "https://json-schema.org/draft-07/schema",
        "http://json-schema.org/schema#", "https://spec.openapis.org/oas/3.1/dialect/base",
        "http://json-schema.org/draft/2020-12/schema", "urn:mine", 7,
    ],
)  # fmt: skip
def test_every_dialect_is_read(dialect: Any) -> None:
    schema = {"$schema": dialect, "properties": {"a": {"$schema": dialect, "type": "integer"}}}
    for strictness in ("strict", "plain", "lenient"):
        assert not schema_error(readable(schema, strictness))


UNBOUND: list[Any] = [
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    {"type": "string", "pattern": "^(?=.*[0-9])[a-z0-9]+$"},
    {"type": "string", "pattern": "^a$|b^c"},
    {"type": "object", "patternProperties": {"(?!x)a": {"type": "null"}}},
    {"type": "integer", "not": {"const": 3}},
    {"if": {"type": "integer"}, "then": {"minimum": 1}, "type": "integer"},
    {"type": "object", "propertyNames": {"maxLength": 3}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "array", "contains": {"type": "null"}},
]


@pytest.mark.parametrize("schema", UNBOUND)
@pytest.mark.parametrize("place", ["{}", '{"properties": {"a": {}}, "type": "object"}'])
def test_what_cannot_be_bound_is_refused_unless_the_schema_is_lenient(
    schema: Any, place: str
) -> None:
    whole = json.loads(place.replace("{}", json.dumps(schema)))
    wanted = StructuredOutputs(json=whole)
    strict: tuple[Strictness, ...] = ("strict", "plain")
    for strictness in strict:
        with pytest.raises(RequestError) as caught:
            output_grammar(wanted, "response_format", False, strictness)
        assert caught.value.code == "invalid_grammar"
    source = output_grammar(wanted, "response_format", False, "lenient")
    assert not accepts(source, "[")  # the rest is bound still
    assert not accepts(source, "true")


@pytest.mark.parametrize("schema", [{"type": "strin"}, {"$ref": "#/no"}, {"minLength": "3"}])
def test_a_wrong_schema_is_refused_lenient_or_not(schema: Any) -> None:
    for strictness in ("strict", "plain", "lenient"):
        with pytest.raises(RequestError):
            output_grammar(StructuredOutputs(json=schema), "f", False, strictness)


def test_an_unknown_format_is_an_annotation_unless_the_schema_is_strict() -> None:
    wanted = StructuredOutputs(json={"type": "string", "format": "path"})
    assert accepts(output_grammar(wanted, "f", False, "plain"), '"x"')
    with pytest.raises(RequestError, match="Unknown format: path"):
        output_grammar(wanted, "f", False, "strict")


def test_what_binds_nothing_is_told() -> None:
    wanted = StructuredOutputs(json={"type": "array", "uniqueItems": True})
    (note,) = grammar_notes(output_grammar(wanted, "f", False, "lenient"))
    assert "uniqueItems" in note


@given(
    lower=st.tuples(st.integers(-3, 3), st.booleans() | st.none()),
    upper=st.tuples(st.integers(-3, 3), st.booleans() | st.none()),
    value=st.integers(-5, 5),
)
def test_bounds_of_draft_4(lower: Any, upper: Any, value: int) -> None:
    """OpenAPI 3.0 has them still: `exclusiveMinimum` is a boolean beside `minimum`."""
    schema: dict[str, Any] = {"type": "integer", "minimum": lower[0], "maximum": upper[0]}
    for key, (_, exclusive) in (("exclusiveMinimum", lower), ("exclusiveMaximum", upper)):
        if exclusive is not None:
            schema[key] = exclusive
    given = jsonschema_rs.Draft4Validator(schema)
    read = jsonschema_rs.Draft202012Validator(read_schema(schema, "strict"))
    assert given.is_valid(value) == read.is_valid(value)


def test_a_reference_without_its_hash_is_read() -> None:
    """LiteLLM sends such ones to Anthropic's API."""
    parameters = {
        "type": "object",
        "$defs": {"n": {"type": "integer"}},
        "properties": {"x": {"$ref": "/$defs/n"}},
        "required": ["x"],
    }
    assert read_schema(parameters, "strict")["properties"] == {"x": {"$ref": "#/$defs/n"}}
    assert types_of({"$ref": "/$defs/n"}, parameters) == {"integer"}
    source = output_grammar(StructuredOutputs(json=parameters), "f", False)
    assert accepts(source, '{"x": 1}')
    assert not accepts(source, '{"x": "1"}')
