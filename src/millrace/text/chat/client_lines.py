"""Lines that a client puts before its system prompt, for servers and not for models.

Claude Code begins its system prompt with a line for Anthropic's accounts, in a block of its own or
in front of the text, that has another number in each request. In the prompt it would make every
request a new one: nothing behind it would ever be found in a prefix cache.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_LINES = re.compile(r"(?:x-anthropic-[a-z-]+:[^\n]*(?:\n|\Z))+")
_SYSTEMS = ("system", "developer")


def without_client_lines(messages: Sequence[Any]) -> Sequence[Any]:
    """The messages without such lines at the begin of their first system messages. What has nothing
    else goes. Malformed messages stay as they are."""
    count = 0
    while count < len(messages) and _role(messages[count]) in _SYSTEMS:
        count += 1
    if not any(_has_lines(one.get("content")) for one in messages[:count]):
        return messages
    read = [_without(one) for one in messages[:count]]
    return [*(one for one in read if one.get("content")), *messages[count:]]


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _has_lines(content: Any) -> bool:
    parts = content if isinstance(content, list) else [content]
    return any(isinstance(text := _text(part), str) and _LINES.match(text) for part in parts)


def _text(part: Any) -> Any:
    return part.get("text") if isinstance(part, Mapping) else part


def _without(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": _LINES.sub("", content, count=1)}
    if not isinstance(content, list):
        return dict(message)
    parts = []
    for part in content:
        text = _text(part)
        if isinstance(part, Mapping) and isinstance(text, str) and _LINES.match(text):
            rest = _LINES.sub("", text, count=1)
            parts += [{**part, "text": rest}] if rest else []
        else:
            parts.append(part)
    return {**message, "content": parts}
