"""Incremental output: however tokens are cut into pieces, the text is the same."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.protocol import SamplingParams
from millrace.text.detokenizer import Detokenizer, Piece, StopSearch, TextDecoder
from millrace.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(text_model: Path) -> Tokenizer:
    return Tokenizer.load(text_model)


def cut(items: list[int], at: list[int]) -> list[list[int]]:
    """The list in pieces, cut at these places (taken modulo its length)."""
    places = sorted({place % (len(items) + 1) for place in at} | {0, len(items)})
    return [items[a:b] for a, b in pairwise(places)]


def pieces(output: Detokenizer, parts: list[list[int]]) -> list[Piece]:
    """Everything that comes of these parts, the last of which ends by length."""
    got = []
    for index, part in enumerate(parts):
        got.append(output.push(part, "length" if index == len(parts) - 1 else None))
        if output.ended_by_text:
            break
    return got


CUTS = st.lists(st.integers(0, 1000), max_size=8)


@given(data=st.data(), cuts=CUTS, skip=st.booleans())
def test_decoding_in_pieces_gives_the_whole_text(
    tokenizer: Tokenizer, data: st.DataObject, cuts: list[int], skip: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), min_size=1, max_size=40))
    decoder = TextDecoder(tokenizer, skip)
    texts = [decoder.feed(part) for part in cut(ids, cuts)]
    assert "".join(texts) + decoder.flush() == tokenizer.decode(ids, skip)


def test_a_character_is_never_split(tokenizer: Tokenizer) -> None:
    ids = [i for byte in "🐢".encode() for i in [_token_of_byte(tokenizer, byte)]]
    decoder = TextDecoder(tokenizer, True)
    assert [decoder.feed([i]) for i in ids] == ["", "", "", "🐢"]


def _token_of_byte(tokenizer: Tokenizer, byte: int) -> int:
    return next(i for i in range(300) if tokenizer.token_bytes[i] == bytes([byte]))


def naive_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The stop text that is complete first, the longest of several, by trying every end."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


AB = st.text("ab", max_size=40)  # two letters, so that stop texts overlap themselves


@settings(max_examples=300)
@given(
    text=AB,
    stops=st.lists(st.text("ab", min_size=1, max_size=8), min_size=1, max_size=3),
    cuts=CUTS,
    include=st.booleans(),
)
def test_stop_search_finds_what_a_naive_search_finds(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    search = StopSearch(stops, include)
    shown, found = "", None
    for part in cut(list(range(len(text))), cuts):
        more, found = search.feed("".join(text[i] for i in part))
        shown += more
        if found:
            break
    if not found:
        shown += search.flush()
    assert (shown, found) == naive_stop(text, stops, include)


def test_a_stop_text_that_begins_twice_is_found() -> None:
    for length in range(1, 9):
        for letters in product("ab", repeat=length):
            stop = "".join(letters)
            for begun in range(1, length):
                for missing in range(1, length):
                    text = stop[:begun] + stop[:-missing] + stop
                    got = StopSearch([stop], False).feed(text)
                    assert got == naive_stop(text, [stop], False), (stop, text)


@settings(max_examples=300)
@given(text=AB, stop=st.text("ab", min_size=1, max_size=9))
def test_only_what_may_begin_a_stop_is_held_back(text: str, stop: str) -> None:
    search = StopSearch([stop], False)
    shown, found = search.feed(text)
    if found is None:
        held = text[len(shown) :]
        assert stop.startswith(held)
        longer = (text[-n:] for n in range(len(held) + 1, len(stop)) if n <= len(text))
        assert not any(stop.startswith(end) for end in longer)


@given(
    words=st.lists(
        st.sampled_from(["stop", "sto", "p", "END", " hello", "日本", "s"]), max_size=12
    ),
    cuts=CUTS,
    include=st.booleans(),
)
def test_a_stop_text_across_tokens_is_found_however_they_come(
    tokenizer: Tokenizer, words: list[str], cuts: list[int], include: bool
) -> None:
    ids = tokenizer.encode("x" + "".join(words))
    params = SamplingParams(stop=["stop", "日本"], include_stop_str_in_output=include)
    one_by_one = pieces(Detokenizer(tokenizer, params), [[i] for i in ids])
    in_parts = pieces(Detokenizer(tokenizer, params), cut(ids, cuts))
    expected, stop = naive_stop("x" + "".join(words), ["stop", "日本"], include)
    for got in (one_by_one, in_parts):
        assert "".join(piece.text for piece in got) == expected
        assert got[-1].stop_reason == stop
        assert got[-1].finish_reason == ("stop" if stop else "length")
    # Tokens past the one that completed the stop text do not count, whatever the pieces.
    counts = [sum(len(piece.token_ids) for piece in got) for got in (one_by_one, in_parts)]
    assert counts[0] == counts[1]


def test_a_stop_token_is_counted_and_not_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello world")
    params = SamplingParams(stop_token_ids=[ids[-1]])
    piece = Detokenizer(tokenizer, params).push(ids, "stop", ids[-1])
    assert piece == Piece(tokenizer.decode(ids[:-1]), ids, "stop", ids[-1])


def test_a_stop_token_is_shown_if_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello world")
    params = SamplingParams(stop_token_ids=[ids[-1]], include_stop_str_in_output=True)
    assert Detokenizer(tokenizer, params).push(ids, "stop", ids[-1]).text == "hello world"


def test_the_natural_end_has_no_stop_reason(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello<|im_end|>")
    piece = Detokenizer(tokenizer, SamplingParams()).push(ids, "stop", ids[-1])
    assert (piece.text, piece.finish_reason, piece.stop_reason) == ("hello", "stop", None)


def test_held_back_text_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    output = Detokenizer(tokenizer, SamplingParams(stop=["stop"]))
    first = output.push(tokenizer.encode("xs"))
    last = output.push(tokenizer.encode("to"), "length")
    assert (first.text, last.text) == ("x", "sto")


def test_a_cut_off_character_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🐢")
    output = Detokenizer(tokenizer, SamplingParams())
    assert output.push(ids[:1]).text == ""
    assert output.push([], "length").text == "\ufffd"


def test_without_detokenizing_there_is_no_text(tokenizer: Tokenizer) -> None:
    params = SamplingParams(detokenize=False, stop=["e"])
    piece = Detokenizer(tokenizer, params).push(tokenizer.encode("hello"), "length")
    assert piece.text == ""
    assert piece.finish_reason == "length"
