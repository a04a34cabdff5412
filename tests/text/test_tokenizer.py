"""The tokenizer against the library it rests on, and files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import CheckpointError, RequestError
from millrace.text.tokenizer import Tokenizer
from tests.support.text_model import write_text_model


@pytest.fixture(scope="module")
def tokenizer(text_model: Path) -> Tokenizer:
    return Tokenizer.load(text_model)


@pytest.fixture(scope="module")
def backend(text_model: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(text_model / "tokenizer.json"))


@given(text=st.text(max_size=60))
def test_text_survives_a_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@given(data=st.data(), skip=st.booleans())
def test_any_ids_decode_as_the_library_decodes_them(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer, data: st.DataObject, skip: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    assert tokenizer.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)


def test_an_id_beyond_the_tokens_is_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size + 3]) == ""


def test_special_tokens_in_text_are_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>")
    assert {ids[0], ids[-1]} <= tokenizer.special_ids
    assert tokenizer.decode(ids) == "user\nhi"


def test_turn_ends_lie_behind_the_line_break(tokenizer: Tokenizer) -> None:
    turns = ["<|im_start|>user\nhi<|im_end|>\n", "<|im_start|>assistant\nyes<|im_end|>", "<think>"]
    lengths = [len(tokenizer.encode(turn)) for turn in turns]
    ends = tokenizer.turn_ends(tokenizer.encode("".join(turns)))
    assert ends == [lengths[0], lengths[0] + lengths[1]]


def test_a_turn_end_may_be_the_last_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hi<|im_end|>")
    assert tokenizer.turn_ends(ids) == [len(ids)]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a readable tokenizer"):
        Tokenizer.load(tmp_path)


def test_with_another_kind_of_tokenizer_prompts_are_token_ids(tmp_path: Path) -> None:
    path = write_text_model(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    path.write_text(json.dumps(content))
    loaded = Tokenizer.load(tmp_path)
    with pytest.raises(RequestError, match=r"decoder WordPiece is not known, .* send token ids"):
        loaded.encode("Hello")
    assert loaded.token_text(7) == "token_id:7"
    assert (loaded.decode([1, 2]), loaded.turn_ends([1, 2]), loaded.token_id("a")) == ("", [], None)


def test_it_has_the_most_used_names_of_transformers(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.get_vocab()
    assert len(vocab) == len(tokenizer) == tokenizer.vocab_size
    end = vocab["<|im_end|>"]
    assert tokenizer.eos_token_id == end
    assert tokenizer.bos_token_id is None
    assert end in tokenizer.all_special_ids
    assert "<|im_end|>" in tokenizer.all_special_tokens
    assert tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "no such token"]) == [end, None]
    ids = tokenizer.encode("hello there")
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids)) == ids
