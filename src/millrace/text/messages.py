"""A conversation as templates read it: checked, and in one of the shapes that clients send.

Errors name the place of the fault. What a message means is the template's business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from millrace.errors import RequestError
from millrace.text.chat.media import not_text
from millrace.text.tools.custom import INPUT
from millrace.text.tools.json_repair import completed

Message = Mapping[str, Any]
_LONG = 20_000  # characters: some milliseconds
_OBJECT = 200  # characters that take as long as an object does


def normalize_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages for a template. Raises RequestError for the first that none could read.

    The role developer is the newer name of system; arguments of past tool calls become objects.
    """
    if not messages:
        raise RequestError("messages is empty; give at least one", param="messages")
    return [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def least_tokens(messages: Sequence[Any]) -> int:
    """Tokens that the prompt has at least: one for each message, and for each call in one."""
    calls = (one.get("tool_calls") for one in messages if isinstance(one, Mapping))
    return len(messages) + sum(len(given) for given in calls if isinstance(given, list))


def is_long(messages: Sequence[Any]) -> bool:
    """Whether to read and render messages may take more than some milliseconds. Also of messages
    as other APIs have them."""
    left = _LONG
    for message in messages:
        for value in message.values() if isinstance(message, Mapping) else ():
            parts = value if isinstance(value, list) else [value]
            left -= max(
                len(parts) * _OBJECT, sum(_weight(one) for one in parts[: _LONG // _OBJECT])
            )
        left -= _OBJECT
        if left < 0:
            return True
    return False


def _weight(part: Any) -> int:
    """Characters of a text, and of the texts in an object; some for the object itself."""
    if isinstance(part, str):
        return len(part)
    if not isinstance(part, Mapping):
        return _OBJECT
    inner = [part, *(value for value in part.values() if isinstance(value, Mapping))]
    texts = (value for one in inner for value in one.values() if isinstance(value, str))
    return _OBJECT + sum(map(len, texts))


def text_length(messages: Sequence[Any]) -> int:
    """Characters of all contents; of malformed messages, none."""
    total = 0
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            total += len(content)
        elif isinstance(content, list):
            texts = (part.get("text") for part in content if isinstance(part, Mapping))
            total += sum(len(text) for text in texts if isinstance(text, str))
    return total


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content", param=where)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where}.role must be a text such as user", param=f"{where}.role")
    found = {**message, "role": "system" if role == "developer" else role}
    if "content" not in message and role not in ("assistant", "tool", "function"):
        raise RequestError(f"{where}.content is missing", param=f"{where}.content")
    found["content"] = _content(message.get("content"), role, f"{where}.content")
    calls = message.get("tool_calls")
    if calls is not None:
        found["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    return found


def _content(content: Any, role: str, where: str) -> Any:
    if isinstance(content, list):
        return [_part(part, f"{where}[{at}]") for at, part in enumerate(content)]
    if content is None and role != "assistant":
        return ""
    if content is not None and not isinstance(content, str):
        raise RequestError(f"{where} must be a text or a list of parts", param=where)
    return content


def _part(part: Any, where: str) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    if kind != "text" or not isinstance(part.get("text"), str):
        raise RequestError(
            f'{where} must be {{"type": "text", "text": ...}}; {not_text(kind)}',
            param=where,
        )
    return part


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RequestError(f"{where} must be a list of calls", param=where)
    return [_tool_call(call, f"{where}[{at}]") for at, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    if isinstance(call, Mapping) and call.get("type") == "custom":
        return _custom_call(call, where)
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(
            f'{where} must be {{"type": "function", "function": {{"name": ...}}}}', param=where
        )
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def _custom_call(call: Message, where: str) -> dict[str, Any]:
    """A call of a custom tool as one of a function with one argument."""
    custom = call.get("custom")
    name = custom.get("name") if isinstance(custom, Mapping) else None
    given = custom.get("input", "") if isinstance(custom, Mapping) else None
    if not isinstance(name, str) or not isinstance(given, str):
        raise RequestError(
            f'{where} must be {{"type": "custom", "custom": {{"name": ..., "input": ...}}}}',
            param=where,
        )
    function = {"name": name, "arguments": {INPUT: given}}
    return {"id": call.get("id"), "type": "function", "function": function}


def _arguments(given: Any, where: str) -> dict[str, Any]:
    """Arguments as an object. Those of an answer that was cut off at max_tokens are closed."""
    if isinstance(given, str):
        try:
            given = _object(given.strip() or "{}")
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where} is not valid JSON: {error}", param=where) from None
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise RequestError(f"{where} must be a JSON object", param=where)
    return given


def _object(text: str) -> Any:
    """Raises ValueError for what is neither JSON nor the begin of an object or array."""
    try:
        return json.loads(text)
    except ValueError:
        whole = completed(text)
        if whole is None:
            raise
        return json.loads(whole)
