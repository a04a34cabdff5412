"""Marks by which clients ask for prefixes to stay cached."""

from __future__ import annotations

from typing import Any

import pytest

from millrace.server.api.chat.cache_marks import cache_pins

SHORT, LONG = {"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}


def block(mark: Any) -> dict[str, Any]:
    return {"type": "text", "text": "x", "cache_control": mark}


@pytest.mark.parametrize(
    ("messages", "more", "found"),
    [
        ([{"role": "user", "content": "x"}], {}, (0.0, 0.0)),
        ([{"role": "user", "content": [block(None), block(SHORT)]}], {}, (0.0, 300.0)),
        ([{"role": "system", "content": [block(LONG)]}], {}, (3600.0, 0.0)),
        ([{"role": "user", "content": [block(SHORT)]}], {"system": [block(LONG)]}, (3600.0, 300.0)),
        ([], {"tools": [{"name": "f", "cache_control": LONG}]}, (3600.0, 0.0)),
        ([], {"whole": SHORT}, (0.0, 300.0)),
        ([{"role": "tool", "content": "x", "cache_control": LONG}], {}, (0.0, 3600.0)),
        ([{"role": "user", "content": [{"content": [block(SHORT)]}]}], {}, (0.0, 0.0)),
        (["x", 7, {"role": "user", "content": [1, block("x")]}], {"system": "s"}, (0.0, 0.0)),
        ([{"role": "user", "content": [block({"type": "ephemeral", "ttl": 7})]}], {}, (0.0, 300.0)),
    ],
)
def test_the_longest_mark_counts(
    messages: list[Any], more: dict[str, Any], found: tuple[float, float]
) -> None:
    assert cache_pins(messages, **more) == found
