"""Chat messages as text, for APIs that take a prompt, and for counting.

What a message holds that text cannot say is refused: it would be other work than the file's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from millrace.errors import UserError

_TEXT_PARTS = ("text", "input_text", "output_text")


def is_messages(content: Any) -> bool:
    """Whether a content is chat messages, and neither text nor token ids."""
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict)


def messages_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The messages as one text. Raises UserError for a part that is not text."""
    return "\n\n".join(text for message in messages if (text := message_text(message)))


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message, and its tool calls as JSON. Raises UserError as above."""
    calls = message.get("tool_calls")
    texts = [_content_text(message.get("content"))]
    if isinstance(calls, list) and calls:
        functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
        texts.append(msgspec.json.encode(functions).decode())
    return "\n".join(text for text in texts if text)


def _content_text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_text(part) for part in content)
    raise UserError(f"a message's content is {_short(content)}; use text or a list of parts")


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") in _TEXT_PARTS:
        text = part.get("text")
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, dict) else _short(part)
    raise UserError(
        f"a message has a part of type {kind!r}, which is no text; use --backend openai-chat for it"
    )


def check_messages(messages: Any) -> None:
    """Raise UserError unless these are chat messages, whatever the kind of their parts."""
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list with one message or more")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"a message is {_short(message)}; use an object with role and content")
        content = message.get("content")
        if content is not None and not isinstance(content, str | list):
            raise UserError(
                f"a message's content is {_short(content)}; use text or a list of parts"
            )


def text_parts(messages: Sequence[Mapping[str, Any]]) -> str:
    """The texts among all parts, to estimate a number of tokens; other parts count nothing."""
    texts = []
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else [content]
        texts += [
            p if isinstance(p, str) else p.get("text") for p in parts if isinstance(p, str | dict)
        ]
    return " ".join(text for text in texts if isinstance(text, str))


def _short(value: Any) -> str:
    return repr(value)[:60]
