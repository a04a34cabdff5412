"""Turns that are encoded once: the same tokens as those of the whole text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.model_lookup import find_model
from millrace.text.chat.encoded_turns import TURN_END, EncodedTurns
from millrace.text.tokenizer import NoTokenizer, Tokenizer

pieces = st.text(max_size=20) | st.sampled_from(
    [TURN_END, "<|im_start|>", "\n", "<think>", " ", "e\u0301", "\u0301", "한"]
)
texts = st.lists(pieces, max_size=12).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(find_model("millrace-mini"))


def encoded(turns: EncodedTurns, tokenizer: Tokenizer, text: str, salt: str = "") -> list[int]:
    """As the server does."""
    split = turns.split(text)
    found = turns.known(split, salt)
    missing = [turn for turn in dict.fromkeys(split) if turn not in found]
    new = turns.cut(missing, tokenizer.encode("".join(missing))) if missing else {}
    turns.keep(new, salt)
    return [token for turn in split for token in (found | new)[turn]]


@given(
    conversation=st.lists(texts, min_size=1, max_size=4), most=st.sampled_from([0, 3000, 1 << 20])
)
def test_tokens_are_those_of_the_whole_text(
    tokenizer: Tokenizer, conversation: list[str], most: int
) -> None:
    turns, text = EncodedTurns(tokenizer, most), ""
    for more in conversation:
        text += more
        assert encoded(turns, tokenizer, text) == tokenizer.encode(text)
        assert turns.bytes <= most


def test_only_new_turns_are_encoded(tokenizer: Tokenizer) -> None:
    turns = EncodedTurns(tokenizer)
    first, second = f"one{TURN_END}", f"\ntwo{TURN_END}"
    encoded(turns, tokenizer, first + second)
    assert list(turns.known([first, second], "")) == [first, second]
    assert turns.split(first + second + "\nrest") == [first, second, "\nrest"]
    assert not turns.known([first, second], "salted")


def test_the_last_used_stay(tokenizer: Tokenizer) -> None:
    turns = EncodedTurns(tokenizer, 10_000)
    kept, others = f"kept{TURN_END}", [f"{n}{TURN_END}" for n in range(40)]
    encoded(turns, tokenizer, kept)
    for other in others:
        encoded(turns, tokenizer, other + kept)
    assert list(turns.known([others[0], kept], "")) == [kept]
    assert turns.bytes <= 10_000


def test_a_text_stays_whole_where_turns_cannot_be_encoded_apart(tmp_path: Path) -> None:
    text = f"a{TURN_END}b"
    file = json.loads((find_model("millrace-mini") / "tokenizer.json").read_text())
    for change in ({"lstrip": True}, {"normalized": True}, {"content": "<|other|>"}):
        tokens = [{**t, **change} if t["content"] == TURN_END else t for t in file["added_tokens"]]
        (tmp_path / "tokenizer.json").write_text(json.dumps({**file, "added_tokens": tokens}))
        assert EncodedTurns(Tokenizer.load(tmp_path)).split(text) == [text]
    assert EncodedTurns(NoTokenizer("none")).split(text) == [text]
