"""Splitting reasoning from the answer: the same parts however the text is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.text.reasoning import ReasoningSplitter, opens_reasoning

CASES = [
    ("So be it.\n</think>\n\nHello!", "So be it.", "Hello!"),
    ("<think>\nSo be it.\n</think>\n\nHello!", "So be it.", "Hello!"),
    ("</think>\n\nHello!", "", "Hello!"),
    ("a </thin b < / c</think>d </think> e", "a </thin b < / c", "d </think> e"),
    ("a <</think>b", "a <", "b"),
    ("a\n\n b \n", "a\n\n b \n", ""),
    ("a </think", "a </think", ""),
    ("a\n</think>\n ", "a", ""),
    ("<thin", "<thin", ""),
    ("", "", ""),
]


def split(parts: list[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter()
    fed = [splitter.feed(part, last=at == len(parts) - 1) for at, part in enumerate(parts)]
    return "".join(one for one, _ in fed), "".join(other for _, other in fed)


@pytest.mark.parametrize(("text", "reasoning", "answer"), CASES)
def test_two_pieces_of_every_size(text: str, reasoning: str, answer: str) -> None:
    for cut in range(len(text) + 1):
        assert split([text[:cut], text[cut:]]) == (reasoning, answer)
    assert split([*text, ""]) == (reasoning, answer)


_WORDS = st.lists(st.sampled_from(["</think>", "<think>", "</th", "<", " ", "\n", "a"]), max_size=9)


@settings(max_examples=200, deadline=None)
@given(_WORDS, st.lists(st.integers(0, 40)))
def test_cuts_change_nothing(words: list[str], cuts: list[int]) -> None:
    text = "".join(words)
    at = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert split([text[i:j] for i, j in pairwise(at)]) == split([text])


def test_what_is_certain_is_shown_at_once() -> None:
    splitter = ReasoningSplitter()
    shown = [splitter.feed(part) for part in ("Well", ", 1 <", " 2", "\n", "</think>", "\n", "x")]
    assert [one for one, _ in shown] == ["Well", ", 1", " < 2", "", "", "", ""]
    assert [other for _, other in shown] == [""] * 6 + ["x"]


@pytest.mark.parametrize(
    ("prompt", "variables", "expected"),
    [
        ("assistant\n<think>\n", {}, {"auto", "qwen3"}),
        ("assistant\n<think>\n\n</think>\n\n", {"enable_thinking": False}, set()),
        ("assistant\n<think>\n\n</think>\n\n", {}, set()),
        ("user\nwhat is <think>?<|im_end|>\nassistant\n", {}, {"qwen3"}),
        ("assistant\n", {"enable_thinking": False}, set()),
    ],
)
def test_when_an_answer_begins_with_reasoning(
    prompt: str, variables: dict[str, bool], expected: set[str]
) -> None:
    for parser in ("auto", "qwen3", "none"):
        assert opens_reasoning(parser, prompt, variables) is (parser in expected)
