"""Forced calls: what the grammar accepts matches the schema, and what matches it accepts."""

from __future__ import annotations

import json
import random
import re
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

import jsonschema_rs
import openai
import pydantic
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from millrace.errors import RequestError
from millrace.text.answer_parser import AnswerParser
from millrace.text.tool_grammar import tool_call_grammar
from millrace.text.tools.parser import ToolParser
from millrace.text.tools.schema import Tool, choose_tools, read_tools
from millrace.text.tools.text_patterns import at_least, at_most, whole_numbers
from millrace.text.tools.values import needs_quotes
from tests.text.test_grammar import TOKENIZER, accepts

END = TOKENIZER.eos_token
MOST = 1200  # bytes of a drawn text before it is given up


def tool_of(parameters: Any, strict: bool = False) -> Tool:
    function = {"name": "f", "parameters": parameters, "strict": strict}
    (tool,) = read_tools([{"type": "function", "function": function}])
    return tool


def source_of(tool: Tool, as_json: bool = False) -> str:
    choice = choose_tools((tool,), "required", parallel=False)
    return tool_call_grammar(choice, as_json, False, lambda _: None)


def read(tool: Tool, text: str) -> Any:
    parser = AnswerParser(None, ToolParser([tool]))
    part = parser.feed(text, last=True)
    assert part.content == ""
    (call,) = parser.calls
    return json.loads(call.arguments)


def written(tool: Tool, arguments: dict[str, Any]) -> str:
    """A call as Qwen's templates write it: texts bare unless they need quotes, the rest as JSON."""

    def value(key: str, given: Any) -> str:
        bare = isinstance(given, str) and not needs_quotes(given, tool.argument_types(key))
        return given if bare else json.dumps(given, ensure_ascii=False)

    inner = "".join(
        f"<parameter={key}>\n{value(key, given)}\n</parameter>\n"
        for key, given in arguments.items()
    )
    return f"<tool_call>\n<function=f>\n{inner}</function>\n</tool_call>"


FRAGMENTS = ["\n</parameter>\n"] * 6 + [
    '"', "5", '"5"', "null", "None", "</parameter>", "<tool_call>", '"</function>"', "\n", "true",
    "{", "]", "\\", '\\"', "1e999", "a",
]  # fmt: skip


def drawn(source: str, seed: int) -> str | None:
    """A text that the grammar accepts, at random of bytes and of fragments that may confuse; None
    if it becomes too long.
    """
    rng = random.Random(seed)
    matcher = LLMatcher(TOKENIZER, source)
    made = bytearray()
    while not matcher.is_stopped() and len(made) <= MOST:
        fragment = list(rng.choice(FRAGMENTS).encode())
        if matcher.validate_tokens(fragment) == len(fragment):
            tokens = fragment
        else:
            mask = matcher.compute_bitmask()
            allowed = [at for at in range(257) if mask[at // 8] >> at % 8 & 1]
            plain = [at for at in allowed if 32 <= at < 127 or at in (10, END)]
            tokens = [rng.choice([at for at in plain if at in b'"]}'] or plain or allowed)]
        if tokens == [END]:
            break
        assert matcher.consume_tokens(tokens), matcher.get_error()
        made += bytes(tokens)
    return made.decode(errors="ignore") if len(made) <= MOST else None


class Case(NamedTuple):
    """A schema and values that match it."""

    schema: Any
    values: st.SearchStrategy[Any]


TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=8),
    st.sampled_from(
        ["", "5", "-1.5e3", "null", "None", "true", "FALSE", "[1]", "{}", '"5"', '"\\"5\\""', '"x"',
         "</parameter>", "a\n</parameter>\n<parameter=a>\nb", "<tool_call>", '"</function>"', "\n",
         "\\n", '\\"5', "5 apples", " null", "x\n", "1e999"]
    ),
)  # fmt: skip
LEAVES = [
    Case({"type": "string"}, TEXTS),
    Case({"type": "string", "minLength": 2, "maxLength": 5},
         TEXTS.filter(lambda text: 2 <= len(text) <= 5)),
    Case({"type": "string", "pattern": "^[a-c]+$"}, st.sampled_from(["a", "cab"])),
    Case({"type": "string", "pattern": "b|^x$"}, st.sampled_from(["x", "abc", "b\n"])),
    Case({"type": "string", "format": "date"}, st.dates().map(str)),
    Case({"type": "string", "format": "uuid"}, st.uuids().map(str)),
    Case({"enum": ["on", "off", "5", None, 7, True, "a</parameter>"]},
         st.sampled_from(["on", "off", "5", None, 7, True, "a</parameter>"])),
    Case({"const": "fixed"}, st.just("fixed")),
    Case({"const": 3}, st.just(3)),
    Case({"type": "integer"}, st.integers(-(10**20), 10**20)),
    Case({"type": "integer", "minimum": 3, "maximum": 17}, st.integers(3, 17)),
    Case({"type": "number"}, st.floats(-1e9, 1e9).map(lambda x: round(x, 3))),
    Case({"type": "boolean"}, st.booleans()),
    Case({"type": "null"}, st.none()),
    Case({"type": ["string", "null"]}, TEXTS | st.none()),
    Case({"type": ["string", "integer", "boolean"]}, TEXTS | st.integers(-9, 9) | st.booleans()),
    Case({"type": "array", "items": {"type": "string"}}, st.lists(TEXTS, max_size=3)),
    Case({"type": "object", "additionalProperties": {"type": "integer"}},
         st.dictionaries(TEXTS, st.integers(0, 9), max_size=2)),
    Case({"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"],
          "additionalProperties": False}, TEXTS.map(lambda t: {"x": t})),
    Case({}, TEXTS | st.integers(-9, 9) | st.none() | st.lists(st.none(), max_size=2)),
    Case({"type": "integer", "minimum": -1000}, st.integers(-1000, 10**6)),
    Case({"allOf": [{"$ref": "#/$defs/choice"}], "description": "x", "default": "red"},
         st.sampled_from(["red", "blue"])),
    Case({"allOf": [{"type": "string", "maxLength": 9}, {"minLength": 2}, {"pattern": "[0-9]"}]},
         st.sampled_from(["12", "a1", "5 apples"])),
    Case({"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
         TEXTS | st.lists(st.integers(), max_size=2)),
    Case({"type": "array", "prefixItems": [{"type": "string"}, {"type": "null"}], "items": False,
          "minItems": 2}, TEXTS.map(lambda text: [text, None])),
    Case({"type": ["object", "string"], "properties": {"k": {"type": "boolean"}}},
         TEXTS | st.sampled_from([{}, {"k": True}])),
    Case({"$ref": "#/$defs/choice"}, st.sampled_from(["red", "blue"])),
    Case({"$ref": "#/$defs/either"}, TEXTS | st.integers(0, 9)),
    Case({"$ref": "#/$defs/tree"}, st.sampled_from([{}, {"next": {}}, {"next": {"next": {}}}])),
    Case({"type": "number", "minimum": 0, "exclusiveMaximum": 2.5}, st.sampled_from([0, 1.25, 2])),
    Case({"type": "integer", "minimum": 0, "maximum": 90, "multipleOf": 30},
         st.sampled_from([0, 30, 60, 90])),
    Case({"allOf": [{"$ref": "#/$defs/score"}], "minimum": 0.05, "title": "x"},
         st.floats(0.05, 1).map(lambda x: round(x, 6))),
    Case({"anyOf": [{"type": "number", "maximum": -1.5}, {"type": "string"}]},
         TEXTS | st.sampled_from([-1.5, -2, -100.25])),
]  # fmt: skip
BOUNDED = [  # numbers of the matcher's JSON: beside them, a text must not begin with a digit
    Case({"type": "number", "multipleOf": 0.5}, st.sampled_from([0, 1.5, 2])),
    Case({"type": "integer", "multipleOf": 3}, st.sampled_from([0, 3, -9])),
]  # fmt: skip
DEFS = {
    "choice": {"type": "string", "enum": ["red", "blue"]},
    "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
    "score": {"type": "number", "maximum": 1, "exclusiveMinimum": -1},
    "tree": {
        "type": "object",
        "properties": {"next": {"$ref": "#/$defs/tree"}},
        "additionalProperties": False,
    },
}


def any_of(cases: list[Case]) -> Case:
    return Case({"anyOf": [one.schema for one in cases]}, st.one_of([one.values for one in cases]))


PROPERTIES = st.sampled_from([*LEAVES, *BOUNDED]) | st.lists(
    st.sampled_from(LEAVES), min_size=2, max_size=3
).map(any_of)


@st.composite
def objects(draw: st.DrawFn, names: str = "abc") -> Case:
    """An object of some properties, or a map."""
    if draw(st.integers(0, 5)) == 0:
        entry = draw(PROPERTIES)
        keys = st.sampled_from(["k", "some key", "x-1"])
        schema = {"type": "object", "additionalProperties": entry.schema}
        return Case(schema, st.dictionaries(keys, entry.values, max_size=3))
    cases = {name: draw(PROPERTIES) for name in names[: draw(st.integers(0, len(names)))]}
    required = [name for name in cases if draw(st.booleans())]
    schema: Any = {"type": "object", "required": required}
    schema["properties"] = {name: one.schema for name, one in cases.items()}
    if draw(st.booleans()):
        schema["additionalProperties"] = False
    fixed = {name: cases[name].values for name in required}
    optional = {name: one.values for name, one in cases.items() if name not in required}
    values = st.fixed_dictionaries(fixed, optional=optional)
    return Case(schema, values.map(lambda got: {k: got[k] for k in cases if k in got}))


@st.composite
def roots(draw: st.DrawFn) -> Case:
    one = draw(objects())
    kind = draw(st.sampled_from(["plain", "plain", "ref", "anyOf", "allOf", "rest", "pointer"]))
    if kind == "ref":
        root = {"$ref": "#/$defs/root", "$defs": {**DEFS, "root": one.schema}}
        return Case(root, one.values)
    if kind == "anyOf":
        other = any_of([one, draw(objects(draw(st.sampled_from(["xyz", "abz"]))))])
        return Case({**other.schema, "$defs": DEFS}, other.values)
    if kind == "allOf":
        limit = {"type": "object", "required": one.schema.get("required", [])}
        return Case({"allOf": [one.schema, limit], "$defs": DEFS}, one.values)
    if kind == "rest" and "properties" in one.schema:
        entry = draw(PROPERTIES)
        schema = {**one.schema, "additionalProperties": entry.schema, "$defs": DEFS}
        others = st.dictionaries(st.sampled_from(["k", "z z"]), entry.values, max_size=2)
        return Case(schema, st.tuples(one.values, others).map(lambda pair: {**pair[0], **pair[1]}))
    if kind == "pointer" and "a" in one.schema.get("properties", {}):
        schema = {**one.schema, "$defs": DEFS}
        schema["properties"] = {**schema["properties"], "z": {"$ref": "#/properties/a"}}
        return Case(schema, one.values)
    return Case({**one.schema, "$defs": DEFS}, one.values)


CAREFUL = settings(
    max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@CAREFUL
@given(roots(), st.data())
def test_what_is_valid_has_a_text_that_is_accepted(case: Case, data: st.DataObject) -> None:
    tool = tool_of(case.schema)
    source = source_of(tool)
    validator = jsonschema_rs.validator_for(case.schema)
    for _ in range(3):
        value = data.draw(case.values)
        assert validator.is_valid(value)
        text = written(tool, value)
        assert read(tool, text) == value, text
        assert accepts(source, text), text


@CAREFUL
@given(roots(), st.integers(0, 2**32))
def test_what_is_accepted_is_valid(case: Case, seed: int) -> None:
    tool = tool_of(case.schema)
    text = drawn(source_of(tool), seed)
    assume(text is not None)
    assert text is not None
    arguments = read(tool, text)
    assert jsonschema_rs.validator_for(case.schema).is_valid(arguments), (text, arguments)


BOUNDS = st.integers(-(10**6), 10**6).map(lambda n: Decimal(n) / 1000) | st.sampled_from(
    [Decimal(text) for text in ("0", "-0.05", "1", "9.9", "-10", "99", "0.999", "100.01", "1E+3")]
)


@given(bound=BOUNDS, near=st.integers(-30, 30), places=st.integers(0, 5), tail=st.integers(0, 3))
def test_decimals_within_bounds(bound: Decimal, near: int, places: int, tail: int) -> None:
    number = bound + Decimal(near) / 10**places
    text = f"{number:f}" + ("." * ("." not in f"{number:f}") + "0" * tail if tail else "")
    for is_open in (False, True):
        above = re.fullmatch(at_least(bound, is_open) or "(?!)", text)
        below = re.fullmatch(at_most(bound, is_open) or "(?!)", text)
        assert bool(above) == (number > bound or (number == bound and not is_open)), text
        assert bool(below) == (number < bound or (number == bound and not is_open)), text


def test_a_number_that_is_read_as_an_excluded_bound_is_not_accepted() -> None:
    tool = tool_of(properties(x={"type": ["number", "string"], "exclusiveMaximum": 2.5}))
    source = source_of(tool)
    assert accepts(source, CALL_OF_X.format("2.4999999999"))
    assert not accepts(source, CALL_OF_X.format("2.49999999999999999999"))


def properties(**given: Any) -> dict[str, Any]:
    return {"type": "object", "properties": given, "required": list(given)}


CALL_OF_X = "<tool_call>\n<function=f>\n<parameter=x>\n{}\n</parameter>\n</function>\n</tool_call>"
STRINGS = [
    ({"anyOf": [{"type": "string", "enum": ["on", "off"]}, {"type": "null"}]},
     ["on", "off", "null"], ['"on"', "On", "None", "x"]),
    ({"enum": ["a", None, 1]}, ["a", "null", "1"], ['"a"', "2"]),
    ({"const": "a"}, ["a"], ["b", '"a"']),
    ({"type": "string", "pattern": "^[a-z]{2}$"}, ["ab"], ["a", "abc", "ab\n"]),
    ({"type": "string", "pattern": "a|^b$"}, ["xax", "b"], ["bb"]),
    ({"type": "string", "pattern": r"^\d+[|^$]$"}, ["1|", "22$"], ["1", "1a"]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["äö", "\n\n\n"], ["a", "abcd"]),
    ({"allOf": [{"type": "string", "maxLength": 3}, {"pattern": "^a"}]}, ["ab"], ["ba", "abcd"]),
    ({"$ref": "#/$defs/red", "maxLength": 4}, ["blue"], ["green", "pink"]),
    ({"type": "string", "format": "date"}, ["2024-02-29"], ["2023-02-29", "2024-13-01", "x"]),
    ({"type": "string", "format": "date-time"}, ["2024-02-29T23:59:59.5Z"], ["2024-02-29"]),
    ({"type": "string", "format": "time"}, ["23:59:59+02:00"], ["24:00:00Z"]),
    ({"type": "string", "format": "duration"}, ["P1DT2H", "P3W"], ["P", "1D"]),
    ({"type": "string", "format": "email"}, ["a.b@c.de"], ["a@", "a"]),
    ({"type": "string", "format": "hostname"}, ["a-b.c"], ["-a", "a..b"]),
    ({"type": "string", "format": "ipv4"}, ["127.0.0.1"], ["256.0.0.1"]),
    ({"type": "string", "format": "ipv6"}, ["::1", "1::2:3", "::ffff:1.2.3.4", "1:2:3:4:5:6:7:8"],
     [":::", "1:2:3:4:5:6:7:8:9", "1::2::3"]),
    ({"type": "string", "format": "uuid"}, ["12345678-1234-1234-1234-123456789abc"], ["1234"]),
    ({"type": "string", "format": "uri"}, ["https://a.b/c?d=e#f", "mailto:x@y"], ["a b", "x"]),
    ({"type": ["integer", "string"]}, ["5", "5 apples", '"5"'], []),
    ({"type": "integer", "minimum": 3, "maximum": 5}, ["3", "5"], ["2", "6", "3.0"]),
    ({"type": "integer", "minimum": 10}, ["10", "99"], ["9", "-11"]),
    ({"type": "boolean"}, ["true"], ["True", "yes"]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "right", "wrong"), STRINGS, ids=lambda one: str(one)[:40])
def test_a_parameter_keeps_to_its_schema(schema: Any, right: list[str], wrong: list[str]) -> None:
    defs = {"red": {"type": "string", "enum": ["red", "blue", "green"]}}
    parameters = {**properties(x=schema), "$defs": defs}
    for strict in (False, True):
        tool = tool_of(parameters, strict)
        source = source_of(tool)
        for text in right:
            call = CALL_OF_X.format(text)
            assert accepts(source, call), text
            assert jsonschema_rs.validator_for(parameters).is_valid(read(tool, call))
            for other in wrong:
                assert not accepts(source, CALL_OF_X.format(other)), other


OBJECTS: list[tuple[Any, list[Any], list[Any]]] = [
    ({"$ref": "#/definitions/A", "definitions": {"A": properties(n={"type": "integer"})}},
     [{"n": 1}], [{}, {"n": "x"}]),
    ({"allOf": [properties(a={"type": "string"}), properties(b={"type": "integer"})]},
     [{"a": "5", "b": 5}], [{"a": "5"}, {"b": 5}]),
    ({"anyOf": [properties(kind={"const": "a"}, x={"type": "string"}),
                properties(kind={"const": "b"}, x={"type": "integer"})]},
     [{"kind": "a", "x": "5"}, {"kind": "b", "x": 5}], [{"kind": "a", "x": 5}, {"kind": "c"}]),
    ({**properties(a=properties(x={"type": "integer"}), b={"$ref": "#/properties/a"})},
     [{"a": {"x": 1}, "b": {"x": 2}}], [{"a": {"x": 1}, "b": {}}]),
    ({"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#"}},
      "required": ["v"], "additionalProperties": False},
     [{"v": 1, "next": {"v": 2, "next": {"v": 3}}}], [{"next": {"v": 1}}, {"v": 1, "next": {}}]),
    ({"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
     [{"a": 1}, {"a": 1, "b c": 2}], [{}, {"a": "x"}]),
    ({"type": "object", "patternProperties": {"^s_": {"type": "string"}, "^n_": {"type": "null"}},
      "additionalProperties": False}, [{}, {"s_a": "5", "n_b": None}], [{"n_a": 5}, {"a": "x"}]),
    ({"anyOf": [{"type": "object", "additionalProperties": {"type": "string"}},
                {"type": "object", "properties": {"x": {"type": "array"}}}]},
     [{}, {"x": [1]}, {"x": "[1]"}, {"x": "5"}, {"x": "a", "k": "[1]"}], [{"x": [1], "k": "a"}]),
    ({"type": "object", "required": ["z"]}, [{"z": "x"}, {"z": [1]}], [{"y": 1}]),
    ({"enum": [{"a": 1}, {"a": "x", "b": None}]}, [{"a": 1}, {"a": "x", "b": None}], [{"a": "x"}]),
    ({"type": "object", "properties": {}}, [{}], [{"a": 1}]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "right", "wrong"), OBJECTS, ids=lambda one: str(one)[:40])
def test_arguments_keep_to_their_schema(schema: Any, right: list[Any], wrong: list[Any]) -> None:
    for strict in (False, True):
        tool = tool_of(schema, strict)
        xml, as_json = source_of(tool), source_of(tool, as_json=True)
        for value in right:
            assert accepts(xml, written(tool, value)), value
            assert read(tool, written(tool, value)) == value
            call = json.dumps({"name": "f", "arguments": value}, ensure_ascii=False)
            assert accepts(as_json, f"<tool_call>\n{call}\n</tool_call>"), value
        for value in wrong:
            assert not accepts(xml, written(tool, value)), value


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (properties(a={"not": {}}), r'parameters\.properties\.a: Unimplemented keys: \["not"\]'),
        (properties(a={"type": "string", "format": "path"}), "Unknown format: path"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
        (properties(a={"oneOf": [{"type": "number"}, {"type": "integer"}]}), "oneOf"),
        (properties(a={"type": "string", "pattern": "(^a)b"}), "pattern '.*' cannot be bound"),
        (properties(**{"a>b": {"type": "string"}}), "no parameter can be called 'a>b'"),
        ({**properties(a={}), "minProperties": 2}, "minProperties"),
        ({"allOf": [{"anyOf": [properties(**{f"a{i}{j}": {}}) for i in range(5)]}
                    for j in range(3)]}, "125 alternatives"),
    ],
)  # fmt: skip
def test_a_strict_function_that_cannot_be_bound_is_refused(schema: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        source_of(tool_of(schema, strict=True))
    assert str(caught.value).startswith("tools[0].function.parameters")
    assert (caught.value.param, caught.value.code) == ("tools", "invalid_grammar")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (properties(a={"type": "strin"}), r"\.properties\.a: Invalid type: strin"),
        (properties(a={"$ref": "#/no"}), "Pointer '/no' does not exist"),
        ({"$ref": "#"}, "circle"),
        ({"type": "string"}, "the arguments of a function are an object"),
        ({"allOf": [properties(a=False)]}, "Unsatisfiable"),
    ],
)
def test_a_schema_that_means_nothing_is_refused(schema: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        source_of(tool_of(schema))


def test_what_the_matcher_does_not_know_binds_nothing_where_it_is_not_strict() -> None:
    unknown = {"type": "string", "format": "path", "contentMediaType": "x"}
    tool = tool_of(properties(a=unknown, b={"type": "array", "uniqueItems": True}))
    assert accepts(source_of(tool), written(tool, {"a": "any", "b": [1, 1]}))


class Point(pydantic.BaseModel):
    x: int
    y: float


class Node(pydantic.BaseModel):
    value: str
    children: list[Node]


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, pydantic.Field(ge=1, le=9)]


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    born: date


class Everything(pydantic.BaseModel):
    mode: Literal["on", "off"] | None
    where: Point | None
    pick: Point | int | str | None
    code: Annotated[str, pydantic.Field(pattern="^[A-Z]{2}[0-9]$")]
    short: Annotated[str, pydantic.Field(min_length=1, max_length=4)]
    id: UUID
    flags: dict[str, bool]
    either: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]


class Pet(pydantic.RootModel[Cat | Dog]):
    pass


@pytest.mark.parametrize("model", [Point, Node, Cat, Dog, Everything, Pet])
def test_pydantic_reads_what_the_grammar_of_its_model_accepts(
    model: type[pydantic.BaseModel],
) -> None:
    """So `chat.completions.parse` reads every forced call that is not cut off."""
    strict: Any = openai.pydantic_function_tool(model, name="f")
    if model is Pet:  # a union at the root, which the client's strict form does not allow
        strict = {
            "type": "function",
            "function": {"name": "f", "parameters": Pet.model_json_schema()},
        }
    (tool,) = read_tools([strict])
    read_some = 0
    for seed in range(12):
        text = drawn(source_of(tool), seed)
        if text is not None:
            model.model_validate(read(tool, text))
            read_some += 1
    assert read_some


@settings(max_examples=300, deadline=None)
@given(*[st.none() | st.integers(-1200, 1200) | st.integers(-(10**7), 10**7)] * 2, st.data())
def test_whole_numbers_within_bounds(
    least: int | None, most: int | None, data: st.DataObject
) -> None:
    pattern = whole_numbers(least, most)
    edges = [one + step for one in (least, most, 0) if one is not None for step in (-1, 0, 1, 9)]
    for number in [*edges, data.draw(st.integers(-(10**8), 10**8))]:
        inside = (least is None or number >= least) and (most is None or number <= most)
        assert bool(pattern and re.fullmatch(pattern, str(number))) is inside, number
