"""Parts of the endpoint on their own: which messages can go, and whose tokens a text is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from millrace.protocol import TokenLogprobs
from millrace.server.api.openai_responses.fitting import droppable
from millrace.server.api.openai_responses.token_logprobs import TextLogprobs
from millrace.text.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("roles", "parts"),
    [
        ("u", []),
        ("su", []),
        ("suauau", [[1], [2], [3], [4]]),
        ("suatat", [[2, 3]]),  # one turn of an agent: its last call stays
        ("suattatta", [[2, 3, 4], [5, 6, 7]]),
        ("uasua", [[0], [1]]),
        ("taut", [[0], [1]]),
        ("a", []),
    ],
)
def test_the_oldest_messages_can_be_dropped(roles: str, parts: list[list[int]]) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages: list[dict[str, Any]] = [{"role": names[role], "content": ""} for role in roles]
    assert [list(part) for part in droppable(messages)] == parts


@pytest.fixture(scope="module")
def tokenizer(text_model: Path) -> Tokenizer:
    return Tokenizer.load(text_model)


def positions(tokenizer: Tokenizer, text: str) -> list[TokenLogprobs]:
    return [TokenLogprobs([token], [-1.0], 1) for token in tokenizer.encode(text, False)]


def taken(found: list[dict[str, Any]]) -> bytes:
    return b"".join(bytes(one["bytes"]) for one in found)


@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_tokens_of_a_text_are_found_again(tokenizer: Tokenizer, cut: int) -> None:
    raw = "a thought t </think>\n\nt, said the fox 🦊. <tool_call> t </tool_call>\nt"
    all_of = positions(tokenizer, raw)
    tokens = TextLogprobs(tokenizer)
    for at in range(0, len(all_of), cut):
        tokens.add(all_of[at : at + cut])
    tokens.skip("a thought t")
    tokens.skip("</think>")
    first = taken(tokens.take("t, said the fox 🦊."))
    tokens.skip("</tool_call>")
    second = taken(tokens.take("t"))
    assert first.decode().strip() == "t, said the fox 🦊."
    assert second.decode().strip() == "t"


def test_a_text_that_comes_in_parts_has_each_token_once(tokenizer: Tokenizer) -> None:
    text = "Wer reitet so spät durch Nacht und Wind?"
    tokens = TextLogprobs(tokenizer)
    tokens.add(positions(tokenizer, text))
    found = [taken(tokens.take(part)) for part in (text[:7], text[7:8], text[8:])]
    assert b"".join(found).decode() == text


def test_a_text_that_is_not_there_takes_what_came(tokenizer: Tokenizer) -> None:
    tokens = TextLogprobs(tokenizer)
    tokens.add(positions(tokenizer, "abc"))
    assert taken(tokens.take("\ufffd")) == b"abc"
    assert tokens.take("more") == []
