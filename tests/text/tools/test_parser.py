"""Tool calls out of a model's text, the same however it is cut."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.errors import RequestError
from millrace.text.answer_parser import AnswerParser
from millrace.text.reasoning import ReasoningSplitter
from millrace.text.tools.parser import CallPart, ToolCallParser, ToolParser
from millrace.text.tools.schema import choose_tools, read_tools

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
    ("ratio", ".5", 0.5),
    ("ratio", "-1.", -1.0),
    ("ratio", "1e999", 1.7976931348623157e308),
    ("ratio", "[1", [1]),
    ("days", "+3", 3),
    ("days", "1_000", 1000),
    ("days", "1e999", "1e999"),
    ("days", "0x10", "0x10"),
    ("days", '"7"', 7),
    ("metric", '"true"', True),
    ("where", '"{\\"a\\": 1}"', {"a": 1}),
    ("where", "{'a': True, 'b': None}", {"a": True, "b": None}),
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
        ("<tool_call><function=weather>\n<parameter=city>\nx and", '{"city": "x and"}'),
        ('<tool_call>{"name": "weather", "arguments": {"city": "}</tool_call>"',
         '{"city": "}</tool_call>"}'),
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
    assert one.feed("Rio de") == [CallPart(0, "Rio de")]
    one = ToolParser(TOOLS)
    first, *parts = one.feed('<tool_call>\n{"name": "weather", "arguments": {"city": "Rio')
    assert isinstance(first, CallPart)
    assert first.name == "weather"
    assert parts == [CallPart(0, '{"city": "Rio')]


def test_reasoning_is_taken_off_first() -> None:
    one = AnswerParser(ReasoningSplitter(), ToolParser(TOOLS))
    thought = "maybe <tool_call> or not"
    part = one.feed(f"{thought}\n</think>\n\n{xml('now')}", last=True)
    assert (part.reasoning, part.content) == (thought, "")
    assert [call.name for call in one.calls] == ["now"]


def arguments_of(text: str) -> list[tuple[str, Any]]:
    _, calls = parse(text)
    return [(name, json.loads(arguments)) for name, arguments in calls]


CLOSERS = re.compile(r"(</(?:parameter|function|tool_call)>\n?)")
TWO_CALLS = xml("weather", city="Paris", days="3") + "\n" + xml("weather", city="Rome", days="4")


def test_calls_of_both_formats_may_lack_their_closing_tags() -> None:
    text = "".join(CLOSERS.split(xml("weather", city="x"))[::2]) + hermes("now")
    assert arguments_of(text) == [("weather", {"city": "x"}), ("now", {})]


@pytest.mark.parametrize("kept", range(1 << 8))
def test_closing_tags_may_be_missing(kept: int) -> None:
    """Every subset of the eight closing tags of two calls; the opening tags tell enough."""
    parts = CLOSERS.split(TWO_CALLS)
    for at in range(8):
        if not kept >> at & 1:
            parts[2 * at + 1] = ""
    assert arguments_of("".join(parts)) == [
        ("weather", {"city": "Paris", "days": 3}),
        ("weather", {"city": "Rome", "days": 4}),
    ]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        # two functions in one block, and one of which no tag opens
        ("<tool_call>\n<function=now>\n</function>\n<function=weather>\n<parameter=city>\nx\n"
         "</parameter>\n</function>\n</tool_call>", "", [("now", {}), ("weather", {"city": "x"})]),
        ("I look.\n\n<function=weather>\n<parameter=city>\nx\n</parameter>\n</function>",
         "I look.", [("weather", {"city": "x"})]),
        ("I look.\n<function=now>\n</function>\n</tool_call> Done.", "I look.Done.", [("now", {})]),
        # words behind a call that does not close its block, and a tag too many
        ("<tool_call>\n<function=now>\n</function>\nwords\n</tool_call>", "words", [("now", {})]),
        ("<tool_call>\n<tool_call>\n<function=now>\n</function>\n</function>\n</tool_call>\n"
         "</tool_call>", "", [("now", {})]),
        ("<tool_call>\n<function=weather>\n<parameter=city>\nx\n</parameter>\n</parameter>\n"
         "</function>\n</tool_call>", "", [("weather", {"city": "x"})]),
        # an opening tag that lacks its end
        ("<tool_call>\n<function=weather\n<parameter=city\nx\n</parameter>\n</function>\n"
         "</tool_call>", "", [("weather", {"city": "x"})]),
        # arguments as JSON inside of the other format, and several calls in one list
        ('<tool_call>\n<function=weather>\n{"city": "x"}\n</function>\n</tool_call>', "",
         [("weather", {"city": "x"})]),
        ('<tool_call>\n[{"name": "now"}, {"name": "weather", "arguments": {"city": "x"}}]\n'
         "</tool_call>", "", [("now", {}), ("weather", {"city": "x"})]),
        ('<tool_call>\n{"name": "now", "arguments": {}}\n{"name": "now", "arguments": {}, "id": 1}'
         "\n</tool_call>", "", [("now", {}), ("now", {})]),
        # closing tags alone on their lines, with words behind them
        (xml("weather", city="x").replace("</function>", "stray <b>\n</function>"),
         "", [("weather", {"city": "x"})]),
        ("<tool_call>\n<function=weather>\n<parameter=city>\nx\n</function>\nDone.", "Done.",
         [("weather", {"city": "x"})]),
        ("<tool_call>\n<function=weather>\n<parameter=city>\nx\n</tool_call>\nDone.", "Done.",
         [("weather", {"city": "x"})]),
        # the first of two values of one parameter holds
        (xml("weather", city="x").replace("</function>", "<parameter=city>\ny\n</parameter>\n"
         "</function>"), "", [("weather", {"city": "x"})]),
    ],
)  # fmt: skip
def test_calls_that_drift_from_the_format(text: str, content: str, calls: Any) -> None:
    assert parse(text)[0] == content
    assert arguments_of(text) == calls


@pytest.mark.parametrize(
    "text",
    [
        "write <function=weather> to call it",
        "<function=unknown>\n<parameter=a>\n1\n</parameter>\n</function>",
        "</tool_call> and </parameter> alone",
        "<tool_call>\n<parameter=city>\nno name\n</parameter>\n</tool_call>",
        "<tool_call></tool_call>",
    ],
)
def test_tags_without_a_call_stay_content(text: str) -> None:
    assert parse(text) == (text, [])


@pytest.mark.parametrize(
    "value",
    [
        "<b>bold</b> < > &amp;",
        "the tag </parameter> ends a value",
        "a </function> b </tool_call> c",
        "write <parameter=unit2> or <tool_call> there",
        "<parameter=unknown>\nx",
        'print("</tool_call>")',
        "\n\nempty lines\n\n",
        "<function name='a'>\n<parameter>\n1\n</parameter>\n2\n</function>\nand more",
        "C:\\dir \\n 'x'",
    ],
)
def test_tags_inside_of_a_text_belong_to_it(value: str) -> None:
    assert arguments_of(xml("weather", city=value, days="3")) == [
        ("weather", {"city": value, "days": 3})
    ]


def test_tags_inside_of_json_belong_to_it() -> None:
    value = ["</parameter>\n</function>", '"</tool_call>', "<parameter=days>"]
    text = xml("weather", tags=json.dumps(value), days="3")
    assert arguments_of(text) == [("weather", {"tags": value, "days": 3})]
    text = hermes("weather", city='</tool_call>"<tool_call>')
    assert arguments_of(text) == [("weather", {"city": '</tool_call>"<tool_call>'})]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("['a', \"b\", None, True]", ["a", "b", None, True]),
        ("['it\\'s', 'it's']", ["it's", "it's"]),
        ('["a", "b",]', ["a", "b"]),
        ('["a", "b"', ["a", "b"]),
        ("('a', 'b')", ["a", "b"]),
        ('["a\nb", "\\d"]', ["a\nb", "\\d"]),
        ("[1e999]", [1.7976931348623157e308]),
        ('"[\\"a\\"]"', ["a"]),
    ],
)
def test_what_is_nearly_json_becomes_json(written: str, meant: Any) -> None:
    assert arguments_of(xml("weather", tags=written)) == [("weather", {"tags": meant})]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('{"city": "a\nb\tc"}', {"city": "a\nb\tc"}),
        ('{"city": "C:\\dir"}', {"city": "C:\\dir"}),
        ("{'city': 'it\\'s', 'metric': True, 'note': None}",
         {"city": "it's", "metric": True, "note": None}),
        ('{"city": "say "hi" now", "days": 3,}', {"city": 'say "hi" now', "days": 3}),
        ('{"days": 1e999}', {"days": 1.7976931348623157e308}),
        ('{"ratio": NaN, "metric": }', {"ratio": "NaN", "metric": None}),
        ('{city: "x", days: 3', {"city": "x", "days": 3}),
    ],
)  # fmt: skip
def test_arguments_that_are_nearly_json_become_json(written: str, meant: Any) -> None:
    text = f'<tool_call>\n{{"name": "weather", "arguments": {written}}}\n</tool_call>'
    text += "\n" + hermes("now")
    assert arguments_of(text) == [("weather", meant), ("now", {})]


@pytest.mark.parametrize("text", ["<parameter=city>\nPar", "<parameter=days>\n1", ""])
def test_an_answer_that_is_cut_leaves_its_call_open(text: str) -> None:
    whole = AnswerParser(None, ToolParser(TOOLS))
    whole.feed(f"<tool_call>\n<function=weather>\n{text}", last=True)
    assert isinstance(json.loads(whole.calls[0].arguments), dict)
    cut = AnswerParser(None, ToolParser(TOOLS))
    cut.feed(f"<tool_call>\n<function=weather>\n{text}", last=True, cut=True)
    assert whole.calls[0].arguments.startswith(cut.calls[0].arguments.removesuffix(": "))
    assert not cut.calls[0].arguments.endswith("}")


@pytest.mark.parametrize("tail", ["", "\n", "\n</", "\n</parameter", "\n<parameter=da"])
def test_a_value_that_is_cut_shows_no_begun_tag(tail: str) -> None:
    one = AnswerParser(None, ToolParser(TOOLS))
    one.feed(f"<tool_call>\n<function=weather>\n<parameter=city>\nPar{tail}", last=True, cut=True)
    assert one.calls[0].arguments == '{"city": "Par'


MUTATIONS = st.lists(st.tuples(st.integers(0, 60), st.sampled_from(["drop", "twice", "swap"])))
WRITTEN = st.sampled_from(
    [
        TWO_CALLS,
        f"Words.\n{hermes('weather', city='a</tool_call>', tags=['x'])}\n{xml('now')}",
        xml("weather", city='"<parameter=days>"', tags="['a', None]", note="None"),
        xml("weather", where='{"a": "</parameter>"}', either="1e999") + "\n" + hermes("now"),
    ]
)


@settings(max_examples=400, deadline=None)
@given(WRITTEN, MUTATIONS, st.lists(st.integers(0, 400), max_size=8), st.booleans(), st.booleans())
def test_mutated_calls(
    text: str, mutations: list[tuple[int, str]], cuts: list[int], thinks: bool, cut: bool
) -> None:
    """However tags are dropped, doubled and swapped: any cut, the same; every end, valid JSON."""
    parts = re.split(r"(</?\w+[^>\n]*>|\n|\"|')", text)
    for at, kind in mutations:
        at %= len(parts) - 1
        if kind == "swap":
            parts[at], parts[at + 1] = parts[at + 1], parts[at]
        else:
            parts[at] *= kind == "twice" and 2
    text = "".join(parts)

    def read(edges: list[int]) -> Any:
        one = AnswerParser(ReasoningSplitter() if thinks else None, ToolParser(TOOLS))
        fed = [one.feed(text[start:end]) for start, end in pairwise([0, *edges, len(text)])]
        fed.append(one.feed("", last=True, cut=cut))
        shown = "".join(part.reasoning for part in fed), "".join(part.content for part in fed)
        return shown, [(call.name, call.arguments) for call in one.calls]

    shown, calls = read([])
    assert read(sorted(cut % (len(text) + 1) for cut in cuts)) == (shown, calls)
    assert read(list(range(1, len(text)))) == (shown, calls)
    for _, arguments in calls if not cut else []:
        json.loads(arguments, parse_constant=lambda name: pytest.fail(name))


CALL_IN_REASONING = f"Look it up.\n{xml('now')}"


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        (CALL_IN_REASONING, "Look it up.", "", 1),
        (f"{CALL_IN_REASONING}\n{hermes('now')}\n", "Look it up.", "", 2),
        (f"I write <tool_call> then.\n{xml('now')}", "I write <tool_call> then.", "", 1),
        ("Look.\n<function=now>\n</function>", "Look.", "", 1),
        (f"{CALL_IN_REASONING}\n</think>\n\nNo.", CALL_IN_REASONING, "No.", 0),
        (f"{CALL_IN_REASONING}\nOr not", f"{CALL_IN_REASONING}\nOr not", "", 0),
        (f"{CALL_IN_REASONING}</think>{xml('now')}", CALL_IN_REASONING, "", 1),
    ],
)
def test_a_call_in_reasoning_that_never_closes(
    text: str, reasoning: str, content: str, calls: int
) -> None:
    for pieces in ([text], list(text)):
        one = AnswerParser(ReasoningSplitter(), ToolParser(TOOLS))
        parts = [one.feed(piece) for piece in pieces] + [one.feed("", last=True)]
        assert "".join(part.reasoning for part in parts) == reasoning
        assert "".join(part.content for part in parts) == content
        assert len(one.calls) == calls


def test_reasoning_that_is_cut_calls_nothing() -> None:
    one = AnswerParser(ReasoningSplitter(), ToolParser(TOOLS))
    part = one.feed(CALL_IN_REASONING, last=True, cut=True)
    assert (part.reasoning, part.content, one.calls) == (CALL_IN_REASONING, "", [])


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
    for wrong in ("some", {"type": "function"}, {"function": {"name": "never"}}):
        with pytest.raises(RequestError, match="tool_choice"):
            choose_tools(TOOLS, wrong)
    with pytest.raises(RequestError, match="needs tools"):
        choose_tools((), "required")
