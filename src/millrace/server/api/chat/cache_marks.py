"""`cache_control` marks of a body: for how long a client wants its prefix to stay cached.

Prefixes are cached without marks. A mark keeps them longer than others: one of the tools or the
system prompt for what all conversations begin with, one of a message for the conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Pins = tuple[float, float]  # seconds: of the system prompt, of the conversation

_SECONDS = {"5m": 300.0, "1h": 3600.0}
_DEFAULT = "5m"
_SYSTEMS = ("system", "developer")


def cache_pins(
    messages: Iterable[Any], *, system: Any = None, tools: Any = None, whole: Any = None
) -> Pins:
    """The longest marks. whole: a mark of the body itself."""
    first, last = _longest([system, tools]), _seconds(whole)
    for message in messages:
        seconds = _longest([message])
        if isinstance(message, Mapping) and message.get("role") in _SYSTEMS:
            first = max(first, seconds)
        else:
            last = max(last, seconds)
    return first, last


def _longest(parts: Iterable[Any]) -> float:
    return max((_seconds(mark) for part in parts for mark in _marks(part)), default=0.0)


def _marks(part: Any) -> Iterator[Any]:
    """Marks of a list's objects, or of an object and the parts of its content."""
    for one in part if isinstance(part, list) else [part]:
        if isinstance(one, Mapping):
            yield one.get("cache_control")
            content = one.get("content")
            for inner in content if isinstance(content, list) else ():
                if isinstance(inner, Mapping):
                    yield inner.get("cache_control")


def _seconds(mark: Any) -> float:
    """What is no mark counts for nothing; one without a known time, or none, as the API's own."""
    if not isinstance(mark, Mapping) or mark.get("type") != "ephemeral":
        return 0.0
    given = mark.get("ttl") or _DEFAULT
    return _SECONDS.get(given if isinstance(given, str) else _DEFAULT, _SECONDS[_DEFAULT])
