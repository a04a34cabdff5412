"""Structural tags: what their grammars accept, in both shapes, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from millrace.errors import RequestError
from millrace.protocol import StructuredOutputs
from millrace.text.grammar import output_grammar
from tests.text.test_grammar import accepts

NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
OLDER = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<f=add>", "schema": NUMBER, "end": "</f>"},
        {"begin": "<f=now>", "schema": {"type": "object", "maxProperties": 0}, "end": "</f>"},
        {"begin": "[x]", "end": ""},
    ],
    "triggers": ["<f=", "["],
}


def source(tag: Any, gap: bool = False) -> str:
    return output_grammar(StructuredOutputs(structural_tag=tag), "response_format", gap)


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("free <b>text</b>", True),
        ('a <f=add>{"n": 3}</f> b <f=add>{"n": 4}</f>', True),
        ('<f=add>{"n": "x"}</f>', False),
        ('<f=add>{"n": 3}', False),
        ("<f=sub>", False),
        ("and [x][1, 2] [x]null", True),
        ("and [y]", False),
    ],
)
def test_structures_within_free_text(text: str, matches: bool) -> None:
    for tag in (OLDER, json.dumps(OLDER)):
        assert accepts(source(tag), text) == matches


def tag(begin: str, content: Any, end: Any = "") -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


ANY = {"type": "any_text"}
WORD = {"type": "regex", "pattern": "[a-z]+"}
THOUGHT = tag("<think>", ANY, "</think>")


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        ({"type": "const_string", "value": 'a "b"\n'}, 'a "b"\n', "a"),
        ({"type": "json_schema", "json_schema": NUMBER}, '{"n": 1}', "{}"),
        (WORD, "abc", "a1"),
        ({"type": "grammar", "grammar": 'root ::= "a" | "b"'}, "b", "c"),
        ({"type": "sequence", "elements": [THOUGHT, WORD]}, "<think>a<b</think>yes", "yes"),
        ({"type": "sequence", "elements": [THOUGHT, ANY]}, "<think></think>1 <b>", "1"),
        ({"type": "or", "elements": [WORD, {"type": "const_string", "value": "7"}]}, "7", "8"),
        ({"type": "sequence", "elements": [{"type": "optional", "content": THOUGHT}, WORD]},
         "yes", "<think>yes"),
        ({"type": "star", "content": tag("<", WORD, ">")}, "<a><b>", "<a><>"),
        ({"type": "plus", "content": tag("<", WORD, ">")}, "<a>", ""),
        (tag("<a>", ANY, ["</a>", "</b>"]), "<a>x</b>", "<a>x</c>"),
        (tag("<a>", WORD, ["</a>", ""]), "<a>x", "<a>x</b>"),
        ({"type": "triggered_tags", "triggers": ["<a"], "tags": [tag("<a>", WORD, "</a>")],
          "at_least_one": True}, "hm <a>x</a>.", "hm"),
        ({"type": "triggered_tags", "triggers": ["<a"], "tags": [tag("<a>", WORD, "</a>")],
          "stop_after_first": True}, "hm <a>x</a>", "hm <a>x</a>."),
        ({"type": "tags_with_separator", "separator": ", ", "at_least_one": True,
          "tags": [tag("<a>", WORD, "</a>"), tag("<b>", WORD, "</b>")]},
         "<b>x</b>, <a>y</a>", "<a>x</a> <a>y</a>"),
    ],
)  # fmt: skip
def test_every_kind_of_format(form: Any, right: str, wrong: str) -> None:
    grammar = source({"type": "structural_tag", "format": form})
    assert accepts(grammar, right)
    assert not accepts(grammar, wrong)
    assert accepts(source({"format": form}, gap=True), "\n\n" + right)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ({"triggers": ["<"]}, "needs format, or structures"),
        ({"structures": 1, "triggers": ["<"]}, "structures must be a list"),
        ({**OLDER, "triggers": []}, "triggers must be a list"),
        ({**OLDER, "triggers": ["<g="]}, "no tag begins with '<g='"),
        ({**OLDER, "triggers": ["<f="]}, r"tags\[2\].begin begins with none of triggers"),
        ({"format": {"type": "music"}}, "format.type must be one of const_string"),
        ({"format": {"type": ["or"]}}, "format.type must be one of const_string"),
        ({"format": {"type": "sequence", "elements": [ANY, WORD]}},
         r"format.elements\[0\]: any_text needs an end"),
        ({"format": {"type": "json_schema", "json_schema": {"type": "strin"}}}, "strin"),
        ({"format": {"type": "json_schema", "json_schema": {}, "style": "xml"}}, "must be json"),
        ({"format": {"type": "sequence", "elements": [WORD] * 600}}, "more than 500 parts"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_with_the_place(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        source(given)
    assert caught.value.code == "invalid_grammar"
    assert str(caught.value).startswith("response_format.structural_tag")


def test_a_deeply_nested_format_is_refused() -> None:
    form: Any = WORD
    for _ in range(2000):
        form = {"type": "star", "content": form}
    with pytest.raises(RequestError, match=r"more than 500 parts|nested too deeply"):
        source({"format": form})
