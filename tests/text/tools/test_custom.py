"""Custom tools: their input out of arguments in any pieces, and their formats as grammars."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from millrace.errors import RequestError
from millrace.text.tool_grammar import tool_call_grammar
from millrace.text.tools.custom import InputReader
from millrace.text.tools.parser import ToolParser
from millrace.text.tools.schema import choose_tools, read_tools

_BYTES = LLTokenizer("byte")
LINES = 'start: line+\nline: ("+" | "-") /[^\\n]*/ NEWLINE\nNEWLINE: "\\n"'


def custom(form: Any = None) -> Any:
    return [{"type": "custom", "custom": {"name": "edit", "description": "Edits.", "format": form}}]


def grammar(syntax: str, definition: str) -> Any:
    return custom({"type": "grammar", "grammar": {"syntax": syntax, "definition": definition}})


def accepts(source: str, text: str) -> bool:
    matcher = LLMatcher(_BYTES, source)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def read(arguments: str, cut: int) -> tuple[str, str]:
    """(what was added piece by piece, the whole input)."""
    reader = InputReader()
    pieces = [arguments[at : at + cut] for at in range(0, len(arguments), cut)]
    added = "".join([*map(reader.feed, pieces), reader.finish()])
    return added, reader.text


@pytest.mark.parametrize("cut", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    "text", ["", "plain", 'a "b" \\ \n\t\x01', "spät 🦊 \u2028", "\\u0041 \\", "}{"]
)
def test_the_input_is_the_same_however_it_is_cut(cut: int, text: str) -> None:
    for ascii_only in (True, False):
        arguments = json.dumps({"input": text}, ensure_ascii=ascii_only)
        assert read(arguments, cut) == (text, text)
        spaced = ' {\n "input" : ' + json.dumps(text, ensure_ascii=ascii_only) + ' , "b": "c"}'
        assert read(spaced, cut) == (text, text)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"b": 1, "input": "late"}', "late"),
        ('{"input": {"a": [1]}}', '{"a": [1]}'),
        ('{"patch": "x"}', '{"patch": "x"}'),
        ("{}", ""),
        ("", ""),
        ('{"inp', ""),
        ('{"input": "cut of', "cut of"),
        ('{"' + "k" * 100 + '": 1, "input": "far"}', "far"),
    ],
)
def test_drifted_arguments_have_an_input_too(arguments: str, text: str) -> None:
    assert [read(arguments, cut) for cut in (1, 7, 500)] == [(text, text)] * 3


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        (grammar("lark", LINES), "+a\n-b <x> y\n"),
        (grammar("regex", "[0-9]{3}"), "123"),
        (grammar("regex", "^(?s:ab.*c)$"), 'ab\n"quoted" c'),
        (grammar("regex", r"[a-z]+\$"), "abc$"),
    ],
)
def test_what_the_grammar_accepts_is_read_again(tools: Any, text: str) -> None:
    made = read_tools(tools)
    source = tool_call_grammar(choose_tools(made, "required"), False, False, lambda text: None)
    call = f"<tool_call>\n<function=edit>\n<parameter=input>\n{text}\n</parameter>\n</function>\n"
    call += "</tool_call>"
    assert accepts(source, call)
    assert not accepts(source, call.replace(text, "no"))
    parser, reader = ToolParser(made), InputReader()
    for part in parser.feed(call, last=True):
        assert not isinstance(part, str)
        reader.feed(part.arguments)
    reader.finish()
    assert reader.text == text


def test_the_model_is_told_of_the_format() -> None:
    (tool,) = read_tools(grammar("lark", LINES))
    function = tool.given["function"]
    assert LINES in function["description"]
    assert function["description"].startswith("Edits.")
    assert function["parameters"]["properties"] == {"input": {"type": "string"}}
    assert tool.strict
    (free,) = read_tools(custom())
    assert not free.strict
    assert free.given["function"]["description"] == "Edits."


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"type": "custom"}], "tools\\[0\\] must be"),
        ([{"type": "custom", "custom": {"name": "a b"}}], "tools\\[0\\].custom.name must be"),
        (custom({"type": "json"}), 'must be of type "text" or "grammar"'),
        (custom({"type": "grammar"}), "needs a syntax"),
        (grammar("bnf", "a"), "needs a syntax"),
    ],
)
def test_a_wrong_custom_tool_is_refused(tools: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_tools(tools)


@pytest.mark.parametrize(
    ("tools", "as_json", "message"),
    [
        (grammar("lark", "start: missing"), False, 'unknown name: "missing"'),
        (grammar("lark", "start: " + "a\na: " * 1001 + '"b"'), False, "at most 1000 work"),
        (grammar("lark", LINES), True, "only a regex can be bound"),
        (grammar("regex", "(a"), False, "unclosed group"),
    ],
)
def test_a_format_that_cannot_be_bound_is_refused(tools: Any, as_json: bool, message: str) -> None:
    choice = choose_tools(read_tools(tools), "required")
    with pytest.raises(RequestError, match=message) as caught:
        tool_call_grammar(choice, as_json, False, lambda text: None)
    assert caught.value.code == "invalid_grammar"


def test_a_regex_binds_calls_in_json_too() -> None:
    choice = choose_tools(read_tools(grammar("regex", "[a-z]+\n")), "required")
    source = tool_call_grammar(choice, True, False, lambda text: None)
    call = '<tool_call>\n{"name": "edit", "arguments": {"input": "abc\\n"}}\n</tool_call>'
    assert accepts(source, call)
    assert not accepts(source, call.replace("abc", "ABC"))
