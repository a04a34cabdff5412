"""The hashes by which gateways and replicas name prefixes of prompts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.common.prefix_hash import (
    BLOCK,
    MAX_BLOCKS,
    MOST_BYTES,
    depth_of,
    hash_chain,
    without_changing_parts,
)

LINE = "x-anthropic-billing-header: cc_version=2.1.37.1ab; cc_entrypoint=cli; cch={};"


def test_long_conversations_that_begin_alike_are_told_apart() -> None:
    system, first, second = b"s" * 60_000, b"a" * 200_000, b"b" * 200_000
    one, other = hash_chain(system + first), hash_chain(system + second)
    shared = [a for a, b in zip(one, other, strict=True) if a == b]
    assert 56_000 < depth_of(shared[-1]) <= 60_000
    assert depth_of(one[-1]) > 240_000
    longer = hash_chain(system + first + second)
    assert longer[: len(one)] == one
    assert len(hash_chain(b"x" * (MOST_BYTES + 9))) == MAX_BLOCKS < 170
    assert depth_of(hash_chain(b"x" * (MOST_BYTES + 9))[-1]) <= MOST_BYTES


def body(number: str, **mark: Any) -> bytes:
    """Of a client that marks its newest message, and begins with a line of its own."""
    system = [{"type": "text", "text": LINE.format(number)}, {"type": "text", "text": "Be brief."}]
    turn = {"role": "user", "content": [{"type": "text", "text": "a" * 900, **mark}]}
    return json.dumps([system, turn]).encode()


def test_what_clients_change_in_each_request_is_no_part_of_a_prompt() -> None:
    plain = hash_chain(body("a1b2c"))
    assert hash_chain(body("00fff")) == plain
    for mark in ({"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}, None):
        assert hash_chain(body("a1b2c", cache_control=mark)) == plain
    assert without_changing_parts(body("1", citations=True)) != without_changing_parts(body("1"))
    joined = json.dumps({"system": LINE.format(1) + "\nBe brief."}).encode()
    assert without_changing_parts(joined) == b'{"system": "Be brief."}'


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (b'{"a": 1, "cache_control": {"type": "ephemeral"}}', b'{"a": 1}'),
        (b'{"cache_control":{"type":"ephemeral"},"a":1}', b'{"a":1}'),
        (b'{"cache_control":null}', b"{}"),
        (b'{"a":1,"cache_control":{"t":1},"b":2}', b'{"a":1,"b":2}'),
        (b'["cache_control", 1]', b'["cache_control", 1]'),
        (rb'{"text":"\"cache_control\": {}"}', rb'{"text":"\"cache_control\": {}"}'),
    ],
)
def test_marks_are_cut_out_as_fields(given: bytes, left: bytes) -> None:
    assert without_changing_parts(given) == left


@given(prompt=st.binary(max_size=3 * BLOCK))
def test_what_holds_neither_stays_as_it_is(prompt: bytes) -> None:
    if b"x-anthropic-" not in prompt and b'"cache_control"' not in prompt:
        assert without_changing_parts(prompt) == prompt
