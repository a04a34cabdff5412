"""Keys: who is let in, and which keys cannot be configured."""

from __future__ import annotations

from pathlib import Path

import pytest

from millrace.common.api_keys import (
    ApiKeys,
    checked_key,
    configured_keys,
    keys_of_file,
    presented_key,
)
from millrace.errors import ConfigError


@pytest.mark.parametrize("key", ["one", "zwei", "ключ"])
def test_each_key_is_accepted_and_nothing_else(key: str) -> None:
    keys = ApiKeys(["one", "zwei", "ключ"])
    assert keys
    assert keys.accept(key.encode())
    for other in (b"", key.encode()[:-1], key.encode() + b"x", key.upper().encode(), b"\xff"):
        assert not keys.accept(other)


def test_without_keys_nothing_is_accepted() -> None:
    assert not ApiKeys([])
    assert not ApiKeys([]).accept(b"")


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "key"),
    [
        (b"Bearer abc", b"", b"abc"),
        (b"bearer  abc ", b"", b"abc"),
        (b"BEARER a b", b"other", b"a b"),
        (b"Bearer", b"other", b""),
        (b"", b" abc ", b"abc"),
        (b"Basic abc", b"", b""),
        (b"Basic abc", b"other", b"other"),
        (b"abc", b"", b""),
        (b"", b"", b""),
    ],
)
def test_where_a_request_carries_its_key(
    authorization: bytes, x_api_key: bytes, key: bytes
) -> None:
    assert presented_key(authorization, x_api_key) == key


@pytest.mark.parametrize("empty", ["", " ", "\t\n", "\u00a0"])
def test_an_empty_key_is_refused_in_one_line(empty: str) -> None:
    with pytest.raises(ConfigError, match=r"^--api-key is empty; give it a key, or leave it out"):
        configured_keys(["good", empty], "--api-key")
    with pytest.raises(ConfigError, match=r"^the variable A_KEY is empty; "):
        configured_keys([], "--api-key", ["NOT_SET", "A_KEY"], {"A_KEY": empty})


def test_a_key_that_no_header_carries_is_refused() -> None:
    with pytest.raises(ConfigError, match="--admin-key: a key has no line breaks"):
        checked_key("a\nb", "--admin-key")


def test_the_flag_comes_before_the_variables() -> None:
    variables = {"FIRST": "one\n", "SECOND": "two", "EMPTY": ""}
    assert configured_keys([" a "], "--api-key", list(variables), variables) == ["a"]
    assert configured_keys([], "--api-key", ["FIRST", "SECOND"], variables) == ["one", "two"]
    assert configured_keys([], "--api-key", ["THIRD"], variables) == []


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n  two \n")
    assert keys_of_file(str(file), "--api-key-file") == ["one", "two"]
    for content, said in ((b"\n \n", "it holds no key"), (b"\xff\xfe", "it is not UTF-8")):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=f"^--api-key-file {file}: {said}"):
            keys_of_file(str(file), "--api-key-file")
    with pytest.raises(ConfigError, match="/nowhere: No such file"):
        keys_of_file("/nowhere", "--api-key-file")
