"""A chat model's answer in its parts: reasoning, content, and calls of tools.

There is one parser for each output; it remembers what came before. It knows text only: streaming
and the shapes of APIs are the server's business.
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

    calls: every call found so far, also those in a resumed request's first part.
    """

    def __init__(
        self, reasoning: ReasoningSplitter | None = None, tools: ToolParser | None = None
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self.calls: list[Call] = []

    @property
    def splits(self) -> bool:
        """Whether an answer may have other parts than content."""
        return self._reasoning is not None or self._tools is not None

    @property
    def reasons(self) -> bool:
        """Whether the answer begins with reasoning."""
        return self._reasoning is not None

    def feed(self, text: str, last: bool = False) -> AnswerPart:
        """What the text adds. last: the answer ends here."""
        reasoning, content = (
            ("", text) if self._reasoning is None else self._reasoning.feed(text, last)
        )
        if self._tools is None:
            return AnswerPart(reasoning, content)
        content, parts = self._tools.feed(content, last)
        for part in parts:
            if part.id is not None and part.name is not None:
                self.calls.append(Call(part.id, part.name))
            self.calls[part.index].arguments += part.arguments
        return AnswerPart(reasoning, content, parts)
