"""JSON that models write: valid JSON stays what it is, and whatever else comes becomes valid."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.text.tools.json_repair import JsonRepair, completed, repaired

TEXTS = st.text(max_size=6) | st.sampled_from(
    ["</tool_call>", '"', "\\", "a\nb", "'", "{", "\\u12", "\\ud800", "\\ud83e\\udd8a"]
)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
CONTAINERS = VALUES.filter(lambda value: isinstance(value, (dict, list)))
CUTS = st.lists(st.integers(0, 200), max_size=6)
PROFILE = settings(max_examples=200, deadline=None)


def fed(text: str, cuts: list[int], ends: tuple[str, ...] = ()) -> tuple[str, str, JsonRepair]:
    """(JSON, what follows it) of a text that comes in pieces."""
    repair = JsonRepair(ends)
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    made, rest = "", ""
    for start, end in pairwise(edges):
        if repair.done:
            rest += text[start:end]
            continue
        made += repair.feed(text[start:end])
        rest = repair.rest if repair.done else ""
    return made + repair.feed("", last=True), rest, repair


@PROFILE
@given(CONTAINERS, st.sampled_from([None, 0, 3]), st.booleans(), CUTS)
def test_json_keeps_its_meaning(
    value: Any, indent: int | None, ascii: bool, cuts: list[int]
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii)
    made, rest, repair = fed(text + " more", cuts, ("</tool_call>",))
    assert json.loads(made) == value
    assert (rest, repair.guesses) == (" more", 0)


@PROFILE
@given(CONTAINERS, st.integers(0, 400))
def test_json_that_is_cut_off_is_closed(value: Any, cut: int) -> None:
    text = json.dumps(value)
    cut = 1 + cut % len(text)
    whole = completed(text[:cut])
    assert whole is not None
    found = json.loads(whole)
    assert type(found) is type(value)
    assert cut < len(text) or found == value


SYMBOLS = ["{", "}", "[", "]", ",", ":", '"', "'", "\\", "\n", " ", "a", "1", "-", "None", "tru",
           "1e999", "\\u12", "\\ud800", "\\ude00", "</tool_call>", "<", "🦊", '"a": ']  # fmt: skip


@PROFILE
@given(st.lists(st.sampled_from(SYMBOLS), max_size=20).map("".join), CUTS)
def test_whatever_begins_as_json_becomes_json(text: str, cuts: list[int]) -> None:
    text = "{" + text
    made, rest, _ = fed(text, [], ("</tool_call>",))
    json.loads(made, parse_constant=lambda name: pytest.fail(name))
    assert fed(text, cuts, ("</tool_call>",))[:2] == (made, rest)
    assert fed(text, list(range(len(text))), ("</tool_call>",))[:2] == (made, rest)


@pytest.mark.parametrize(
    ("text", "meant", "guesses"),
    [
        ("{'a': 'it\\'s', \"b\": None}", {"a": "it's", "b": None}, False),
        ("[True, FALSE, null,]", [True, False, None], False),
        ('["a\nb\t", "C:\\dir"]', ["a\nb\t", "C:\\dir"], False),
        ('["\\ud83e\\udd8a", "\\ud83e", "\\udd8a\\u0041"]', ["🦊", "\ufffd", "\ufffdA"], False),
        ('["say "hi" now"]', ['say "hi" now'], True),
        ('{a: b, "c": 5}', {"a": "b", "c": 5}, True),
        ('{"a": [1, 2}', {"a": [1, 2]}, True),
        ("[-1e999, 1e999, 00]", [-1.7976931348623157e308, 1.7976931348623157e308, "00"], True),
    ],
)
def test_what_models_write(text: str, meant: Any, guesses: bool) -> None:
    found = repaired(text)
    assert found is not None
    assert json.loads(found[0]) == meant
    assert bool(found[1]) is guesses


def test_long_texts_take_time_by_their_length() -> None:
    """Each piece is looked at once: a million characters are no million copies of themselves."""
    value = {"a": ['line "q" <b>\n' * 20_000, list(range(20_000))]}
    text = json.dumps(value)
    made, _, _ = fed(text, list(range(0, len(text), len(text) // 50)))
    assert json.loads(made) == value
