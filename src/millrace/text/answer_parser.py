"""A chat model's answer in its parts: reasoning, words, and calls of tools.

One parser an output: it remembers what came before. It knows text only; whether the answer is then
streamed, and in whose API's shapes, is the server's business.
"""

from __future__ import annotations

import msgspec

from millrace.text.reasoning import ReasoningSplitter
from millrace.text.tool_parser import CallPart, ToolParser


class AnswerPart(msgspec.Struct, frozen=True):
    """What some text added."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPart] = []


class Call(msgspec.Struct):
    """One call so far. arguments: JSON text."""

    id: str
    name: str
    arguments: str = ""


class AnswerParser:
    """Takes an answer's text as it comes. reasoning, tools: None if there are none to find.

    calls: every call found so far, whole; it counts those of a resumed request's first part, too.
    """

    def __init__(
        self, reasoning: ReasoningSplitter | None = None, tools: ToolParser | None = None
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self.calls: list[Call] = []

    @property
    def splits(self) -> bool:
        """Whether an answer may have other parts than words."""
        return self._reasoning is not None or self._tools is not None

    @property
    def reasons(self) -> bool:
        """Whether the answer begins with reasoning."""
        return self._reasoning is not None

    def feed(self, text: str, last: bool = False) -> AnswerPart:
        """What the text adds. last: the answer ends here."""
        thought, words = ("", text) if self._reasoning is None else self._reasoning.feed(text, last)
        if self._tools is None:
            return AnswerPart(thought, words)
        words, parts = self._tools.feed(words, last)
        for part in parts:
            if part.id is not None and part.name is not None:
                self.calls.append(Call(part.id, part.name))
            self.calls[part.index].arguments += part.arguments
        return AnswerPart(thought, words, parts)
