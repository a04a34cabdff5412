"""Tool calls out of a model's text, the same however it is cut."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.errors import RequestError
from millrace.text.answer_parser import AnswerParser
from millrace.text.reasoning import ReasoningSplitter
from millrace.text.tool_parser import ToolCallParser, ToolParser
from millrace.text.tool_schema import choose_tools, read_tools

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "ratio": {"type": "number"},
        "metric": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "where": {"$ref": "#/$defs/place"},
        "note": {"type": ["string", "null"]},
        "unit": {"enum": ["C", "F"]},
        "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
    },
    "$defs": {"place": {"type": "object"}},
}
TOOLS = read_tools(
    [
        {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
        {"type": "function", "function": {"name": "now"}},
    ]
)


def xml(name: str, **values: str) -> str:
    inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def hermes(name: str, **arguments: Any) -> str:
    call = {"name": name, "arguments": arguments}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def parse(text: str, cuts: list[int] | None = None, parser: ToolCallParser = "auto") -> Any:
    """(words, [(name, arguments as JSON text)]) of a text that comes in pieces."""
    one = AnswerParser(None, ToolParser(TOOLS, parser))
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts or [])})
    words = ""
    for start, end in pairwise(edges):
        words += one.feed(text[start:end]).content
    words += one.feed("", last=True).content
    return words, [(call.name, call.arguments) for call in one.calls]


VALUES = [
    ("city", "Paris", "Paris"),
    ("city", "", ""),
    ("city", "5", "5"),
    ("city", 'say "hi"\n  <b>\\</b> 🦊', 'say "hi"\n  <b>\\</b> 🦊'),
    ("city", "two\nlines\n", "two\nlines\n"),
    ("unknown", "12", "12"),
    ("days", "12", 12),
    ("days", "many", "many"),
    ("ratio", "1.5e3", 1500.0),
    ("ratio", "NaN", "NaN"),
    ("metric", "true", True),
    ("metric", "False", False),
    ("tags", '["a", "</b>"]', ["a", "</b>"]),
    ("where", '{"x": {"y": [1]}}', {"x": {"y": [1]}}),
    ("note", "null", None),
    ("note", "None of it", "None of it"),
    ("note", '"quoted"', '"quoted"'),
    ("unit", "C", "C"),
    ("either", "7", 7),
    ("either", "seven", "seven"),
    ("either", "7.5", "7.5"),
    ("days", "9" * 5000, "9" * 5000),
]


@pytest.mark.parametrize(("key", "written", "meant"), VALUES)
def test_a_value_gets_the_type_of_its_schema(key: str, written: str, meant: Any) -> None:
    words, calls = parse(xml("weather", **{key: written}))
    assert words == ""
    ((name, arguments),) = calls
    assert name == "weather"
    assert json.loads(arguments) == {key: meant}
    assert type(json.loads(arguments)[key]) is type(meant)


@pytest.mark.parametrize("write", [xml, hermes])
def test_calls_beside_each_other_and_words_before_them(write: Any) -> None:
    text = f"Let me see.\n\n{write('weather', city='Paris')}\n{write('now')}\n"
    words, calls = parse(text)
    assert words == "Let me see."
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        ("weather", {"city": "Paris"}),
        ("now", {}),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "no call at all  \n",
        "a < b and <tool_cal",
        "the marker <tool_call> is no call",
        "<tool_call>\n[1, 2]\n</tool_call> is none",
        '<tool_call>{"neither": "name"}</tool_call> so it is shown',
        '<tool_call>{"name": "cut',
        "<tool_call>",
        "\n\n",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert parse(text) == (text, [])


def test_a_parser_knows_only_its_own_way() -> None:
    for text, parser in ((hermes("now"), "qwen3_coder"), (xml("now"), "hermes")):
        assert parse(text, parser=parser) == (text, [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('<tool_call>{"arguments": {"city": "x"}, "name": "weather"}</tool_call>', '{"city": "x"}'),
        ('<tool_call>{"name": "weather", "arguments": "{\\"a\\": 1}"}</tool_call>', '{"a": 1}'),
        ('<tool_call>{"name": "weather"}</tool_call>', "{}"),
        ("<tool_call><function=weather></function></tool_call>", "{}"),
        ("<tool_call><function=weather>\n<parameter=city>\nx</parameter></tool_call>",
         '{"city": "x"}'),
        ("<tool_call><function=weather>\n<parameter=city>\nx\n</parameter>\n", '{"city": "x"}'),
        ("<tool_call><function=weather>\n<parameter=city>\nx and", '{"city": "x and'),
        ('<tool_call>{"name": "weather", "arguments": {"city": "}</tool_call>"',
         '{"city": "}</tool_call>"'),
    ],
)  # fmt: skip
def test_odd_and_cut_off_calls(text: str, arguments: str) -> None:
    assert parse(text) == ("", [("weather", arguments)])


PIECES = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", "<function=weather>", "</function>", "<parameter=city>",
         "<parameter=tags>", "</parameter>", "\n", " ", '{"name": "now", "arguments": {"a": "}"}}',
         '{"name": "now"', ', "arguments": {', '"', "}", "x", "[1, 2]", "<", "🦊"]
    ),
    max_size=14,
).map("".join)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(text=PIECES, cuts=st.lists(st.integers(0, 400), max_size=30))
def test_cuts_change_nothing(text: str, cuts: list[int]) -> None:
    assert parse(text, cuts) == parse(text) == parse(text, list(range(len(text))))


def test_arguments_are_streamed_as_they_come() -> None:
    one = ToolParser(TOOLS)
    one.feed("<tool_call>\n<function=weather>\n<parameter=city>\n")
    _, parts = one.feed("Rio de")
    assert "".join(part.arguments for part in parts) == "Rio de"
    one = ToolParser(TOOLS)
    _, parts = one.feed('<tool_call>\n{"name": "weather", "arguments": {"city": "Rio')
    assert parts[0].name == "weather"
    assert parts[1].arguments == '{"city": "Rio'


def test_reasoning_is_taken_off_first() -> None:
    one = AnswerParser(ReasoningSplitter(), ToolParser(TOOLS))
    thought = "maybe <tool_call> or not"
    part = one.feed(f"{thought}\n</think>\n\n{xml('now')}", last=True)
    assert (part.reasoning, part.content) == (thought, "")
    assert [call.name for call in one.calls] == ["now"]


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"type": "retrieval"}], "tools[0] must be"),
        ([{"function": {"name": "a b"}}], "tools[0].function.name must be"),
        ([{"function": {"name": "a", "parameters": []}}], "tools[0].function.parameters must be"),
        ([{"function": {"name": "a"}}] * 2, "two functions called a"),
        ([{"function": {"name": f"a{i}"}} for i in range(129)], "at most 128"),
    ],
)
def test_wrong_tools_are_named(tools: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_tools(tools)
    assert message in str(caught.value)
    assert caught.value.param == "tools"


def test_tool_choice() -> None:
    assert choose_tools(TOOLS, None).mode == "auto"
    assert choose_tools((), "auto").mode == "none"
    assert choose_tools(TOOLS, "required").tools == TOOLS
    named = choose_tools(TOOLS, {"type": "function", "function": {"name": "now"}})
    assert (named.mode, named.tools, named.parallel) == ("required", TOOLS[1:], False)
    some = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
    chosen = choose_tools(TOOLS, {"type": "allowed_tools", "allowed_tools": some})
    assert (chosen.mode, chosen.tools) == ("required", TOOLS[1:])
    for wrong in ("any", {"type": "function"}, {"function": {"name": "never"}}):
        with pytest.raises(RequestError, match="tool_choice"):
            choose_tools(TOOLS, wrong)
    with pytest.raises(RequestError, match="needs tools"):
        choose_tools((), "required")
