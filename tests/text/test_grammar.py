"""Structured outputs as grammars: what they accept, and where a wrong one is wrong."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from millrace.engine.grammar import Grammars
from millrace.errors import RequestError
from millrace.protocol import AddRequest, Grammar, SamplingParams, StructuredOutputs
from millrace.text.grammar import output_grammar, output_rules
from millrace.text.tool_grammar import tool_call_grammar
from millrace.text.tools.schema import choose_tools, read_tools
from tests.text.tools.test_parser import SCHEMA, hermes, parse, xml


class _Bytes:
    """A tokenizer of one token a byte."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [bytes([i]) for i in range(256)] + [b"<eos>", b"<tool_call>", b"</tool_call>"]
    special_token_ids = [256, 257, 258]  # noqa: RUF012

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()))


MARKERS = {"<tool_call>": 257, "</tool_call>": 258}


def accepts(source: str, text: str, markers: bool = False) -> bool:
    """markers: the two are tokens of their own."""
    matcher = LLMatcher(TOKENIZER, source)
    assert not matcher.is_error(), matcher.get_error()
    data: list[int] = []
    for part in re.split("(</?tool_call>)", text) if markers else [text]:
        data += [MARKERS[part]] if markers and part in MARKERS else list(part.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("wanted", "right", "wrong"),
    [
        ({"json": PERSON}, '{"name": "A", "age": 3}', '{"name": "A"}'),
        ({"json": json.dumps(PERSON)}, '{\n  "name": "A",\n  "age": 3\n}', "{}"),
        ({"json_object": True}, '{"a": [1, null]}', "[1]"),
        ({"regex": r"[0-9]{2}/\d"}, "12/3", "12/"),
        ({"regex": r"a\/b\\"}, "a/b\\", "a/b"),
        ({"choice": ["red", 'b"l\nue']}, 'b"l\nue', "blue"),
        ({"grammar": 'start: "a" start "b" | "{}"'}, "aa{}bb", "aa{}b"),
    ],
)
def test_what_matches(wanted: Any, right: str, wrong: str) -> None:
    for gap in (False, True):
        source = output_grammar(StructuredOutputs(**wanted), "field", gap)
        assert accepts(source, right)
        assert not accepts(source, wrong)
        assert accepts(source, "\n\n" + right) == gap


def test_white_space_in_json_has_an_end() -> None:
    source = output_grammar(StructuredOutputs(json_object=True), "field", False)
    assert not accepts(source, '{"a":' + "\n" * 20 + "1}")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"json": {"type": "objekt"}}, "f, schema: Invalid type: objekt"),
        (
            {"json": {"properties": {"a": {"items": {"anyOf": [{}, {"type": "strin"}]}}}}},
            "f, schema.properties.a.items.anyOf[1]: Invalid type: strin",
        ),
        (
            {"json": {"$defs": {"x": {"type": 7}}, "properties": {"a": {"$ref": "#/$defs/x"}}}},
            "f, schema.$defs.x: ",
        ),
        ({"json": {"properties": {"a": {"$ref": "#/no"}}}}, "f, schema.properties.a: Pointer"),
        ({"json": {"properties": 5}}, "f, schema: properties must be an object"),
        ({"json": "{"}, "f: the schema is not valid JSON"),
        ({"regex": "ab[c"}, "f.regex: unclosed character class, at character 3"),
        ({"regex": "a(?=b)"}, "f.regex: look-around"),
        ({"grammar": 'start: "a" ('}, "f.grammar: line 1, column 13: Expected token ')'"),
        ({"grammar": "start: nothing"}, 'f.grammar: line 1, column 8: unknown name: "nothing"'),
        ({"grammar": 'x\n}\nstart: "a"'}, "f.grammar: line 1, column 2"),
        ({"choice": ["a", ""]}, "f: a choice is empty"),
        ({"choice": ["x" * (1 << 18)]}, "at most 262144 work"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(wanted: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        output_grammar(StructuredOutputs(**wanted), "f", False)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.param == "f"


@pytest.mark.parametrize(
    "grammar",
    ["start: " + "(" * 100_000, "start: /" + "(" * 100_000 + "/", "\x00", "start: start"],
)
def test_a_hostile_grammar_is_refused_or_harmless(grammar: str) -> None:
    with contextlib.suppress(RequestError):
        output_grammar(StructuredOutputs(grammar=grammar), "f", False)


TOOLS = read_tools(
    [
        {
            "type": "function",
            "function": {"name": "weather", "parameters": {**SCHEMA, "required": ["city"]}},
        },
        {"type": "function", "function": {"name": "now"}},
    ]
)


def source_of(choice: Any, as_json: bool, parallel: bool = True) -> str:
    return tool_call_grammar(choose_tools(TOOLS, choice, parallel), as_json, False, lambda _: None)


def test_a_forced_call_is_one_that_the_parser_reads() -> None:
    text = xml("weather", city="São\nPaulo", days="3", metric="true", where="{}", unit="C")
    assert accepts(source_of("required", False), text)
    assert parse(text)[1][0][0] == "weather"
    text = hermes("weather", city="Rio", days=3)
    assert accepts(source_of("required", True), text)


def test_a_forced_call_keeps_to_the_schema() -> None:
    source = source_of("required", False)
    assert not accepts(source, xml("weather", days="3"))  # city is required
    assert not accepts(source, xml("weather", city="x", days="many"))
    assert not accepts(source, xml("weather", city="x", unit="K"))
    assert not accepts(source, xml("never"))
    assert not accepts(source, xml("weather", city="a</parameter>b"))
    assert not accepts(source, "words")


def test_one_call_or_several() -> None:
    two = xml("now") + "\n" + xml("now")
    assert accepts(source_of("required", False), two)
    assert not accepts(source_of("required", False, parallel=False), two)
    named = {"type": "function", "function": {"name": "now"}}
    assert accepts(source_of(named, False), xml("now"))
    assert not accepts(source_of(named, False), xml("weather", city="x"))


def test_words_are_free_and_the_calls_of_strict_tools_are_not() -> None:
    given = [{**tool.given, "function": {**tool.given["function"]}} for tool in TOOLS]
    given[0]["function"]["strict"] = True
    choice = choose_tools(read_tools(given), "auto")
    source = tool_call_grammar(choice, False, False, MARKERS.get)
    good = xml("weather", city="x", days="3")
    for text in ("", "words < alone", good, f"words\n{good} and {xml('now', any='thing')} more"):
        assert accepts(source, text, markers=True), text
    for text in (xml("weather", days="3"), xml("never"), "a <tool_call> b"):
        assert not accepts(source, text, markers=True), text
    one = tool_call_grammar(
        choose_tools(read_tools(given), "auto", False), False, False, MARKERS.get
    )
    assert accepts(one, "words" + good, markers=True)
    assert not accepts(one, good + good, markers=True)


@pytest.mark.parametrize("as_json", [True, False])
def test_an_answer_is_calls_or_matches_its_schema(as_json: bool) -> None:
    body = output_rules(StructuredOutputs(json=PERSON), "field")
    source = tool_call_grammar(choose_tools(TOOLS, "auto"), as_json, True, MARKERS.get, body)
    call = hermes("now", any=1) if as_json else xml("now", any="1")
    for text in (call, f"\n\n{call}\n{call}", '{"name": "A", "age": 3}'):
        assert accepts(source, text, markers=True), text
    for text in ("words", '{"name": "A"}', call + '{"name": "A", "age": 3}'):
        assert not accepts(source, text, markers=True), text


def test_what_the_matcher_cannot_bind_is_refused_for_strict_tools_alone() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    for strict in (False, True):
        function = {"name": "f", "parameters": schema, "strict": strict}
        choice = choose_tools(read_tools([{"type": "function", "function": function}]), "required")
        if not strict:
            assert accepts(
                tool_call_grammar(choice, False, False, lambda _: None), xml("f", a="[1, 1]")
            )
            continue
        with pytest.raises(RequestError, match=r"properties\.a: .*uniqueItems"):
            tool_call_grammar(choice, False, False, lambda _: None)


def test_a_wrong_schema_of_a_tool_is_told_with_its_place() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "strin"}}}
    tools = read_tools([{"type": "function", "function": {"name": "f", "parameters": schema}}])
    for as_json in (False, True):
        with pytest.raises(RequestError) as caught:
            tool_call_grammar(choose_tools(tools, "required"), as_json, False, lambda _: None)
        assert "tools[0].function.parameters.properties.a: " in str(caught.value)


@pytest.mark.parametrize("source", [None, "raise ImportError('no ABI')"])
def test_a_server_without_llguidance_says_so(
    source: str | None,
    tmp_path: Path,
    replace_package: Callable[[str, str | None], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client learns what the server lacks, and the server's log why."""
    replace_package("llguidance", source)
    with pytest.raises(RequestError, match="llguidance, which the server cannot import"):
        output_grammar(StructuredOutputs(regex=f"alone {source}"), "f", False)
    grammars = Grammars(tmp_path / "tokenizer.json", 300, [2], 1)
    request = AddRequest("a", [1], SamplingParams(), grammar=Grammar('start: "a"'))
    with pytest.raises(RequestError, match="llguidance, which the server cannot import"):
        grammars.compile(request).result(10)
    grammars.close()
    (record,) = caplog.records
    assert record.message.startswith("llguidance is ")
    assert ("no ABI" in record.message) == (source is not None)


def test_nothing_follows_the_last_property_that_there_can_be() -> None:
    """A pattern that only a named property matches leaves no further name."""
    schema = {
        "type": "object",
        "properties": {"score": {"type": "integer", "multipleOf": 5}, "tags": {"type": "array"}},
        "required": ["score", "tags"],
        "additionalProperties": False,
        "patternProperties": {"^score$": {"type": "integer"}, "^note$": {"type": "string"}},
    }
    source = output_grammar(StructuredOutputs(json=schema), "field", False)
    assert accepts(source, '{"score": 5, "tags": [], "note": "x"}')
    for wrong in ('{"score": 4, "tags": []}', '{"score": 5, "tags": [], "note": 1}'):
        assert not accepts(source, wrong)
    matcher = LLMatcher(TOKENIZER, source)
    text = b'{"score": 5, "tags": [], "note": "x"'
    assert matcher.try_consume_tokens([*text, *b","]) == len(text)


@pytest.mark.parametrize(
    ("options", "right", "wrong"),
    [
        ({"disable_any_whitespace": True}, '{"name":"A","age":3}', '{"name": "A","age":3}'),
        ({"whitespace_pattern": " "}, '{ "name" : "A" , "age" : 3 }', '{\n"name": "A", "age": 3}'),
        ({"disable_additional_properties": True},
         '{"name": "A", "age": 3}', '{"name": "A", "age": 3, "more": 1}'),
    ],
)  # fmt: skip
def test_vllms_options_of_json(options: Any, right: str, wrong: str) -> None:
    schema = {key: value for key, value in PERSON.items() if key != "additionalProperties"}
    source = output_grammar(StructuredOutputs(json=schema, **options), "field", False)
    assert accepts(source, right)
    assert not accepts(source, wrong)
