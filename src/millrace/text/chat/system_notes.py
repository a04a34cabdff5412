"""Several system messages for templates that take one, in front.

Clients of agents add system messages to a conversation as it goes on. What a template writes of
them must not change what lies before: else nothing of the conversation is found in a prefix cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def one_system_message(messages: list[dict[str, Any]], continued: bool) -> list[dict[str, Any]]:
    """The system messages in front as one; later ones, which clients add to a conversation as it
    goes on, become parts of the messages beside them: in front they would change what lies before
    the whole conversation. continued: the final message stays."""
    leading = 0
    while leading < len(messages) and messages[leading].get("role") == "system":
        leading += 1
    if continued and leading == len(messages):
        leading -= 1
    systems, found = messages[:leading], _Notes()
    for at, one in enumerate(messages[leading:], leading):
        if one.get("role") == "system" and not (continued and at == len(messages) - 1):
            found.note(_joined(one.get("content")))
        else:
            found.add(one)
    rest = found.all()
    if not systems:
        return rest
    texts = [text for one in systems if (text := _joined(one.get("content")))]
    whole = systems[0] if leading == 1 else {**systems[0], "content": "\n\n".join(texts)}
    return [whole, *rest]


class _Notes:
    """Messages with notes of the system among them: at the message before, if that is not the
    assistant's, else at the next one, else as a message of their own."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._waiting: list[str] = []

    def note(self, text: str) -> None:
        if not text:
            return
        note = f"<system-reminder>\n{text}\n</system-reminder>"
        if self._messages and not self._waiting and _takes_notes(self._messages[-1]):
            last = self._messages[-1]
            self._messages[-1] = {**last, "content": _behind(last.get("content"), note)}
        else:
            self._waiting.append(note)

    def add(self, message: dict[str, Any]) -> None:
        if self._waiting and not _takes_notes(message):
            self._own_message()
        elif self._waiting:
            notes = "\n".join(self._waiting) + "\n"
            message = {**message, "content": _before(message.get("content"), notes)}
            self._waiting = []
        self._messages.append(message)

    def all(self) -> list[dict[str, Any]]:
        if self._waiting:
            self._own_message()
        return self._messages

    def _own_message(self) -> None:
        self._messages.append({"role": "user", "content": "\n".join(self._waiting)})
        self._waiting = []


def _takes_notes(message: Mapping[str, Any]) -> bool:
    return message.get("role") in ("user", "tool")


def _behind(content: Any, text: str) -> Any:
    if isinstance(content, list):
        return [*content, {"type": "text", "text": f"\n{text}"}]
    return f"{content}\n{text}" if content else text


def _before(content: Any, text: str) -> Any:
    if isinstance(content, list):
        return [{"type": "text", "text": text}, *content]
    return f"{text}{content or ''}"


def _joined(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""
