"""A chat model's answer in its parts: reasoning, content, and calls of tools.

There is one parser for each output; it remembers what came before. It knows text only: streaming
and the shapes of APIs are the server's business.
"""

from __future__ import annotations

import re
from itertools import islice

import msgspec

from millrace.text.detokenizer import Piece
from millrace.text.reasoning import ReasoningSplitter
from millrace.text.tools.call_tags import CALL, FUNCTION
from millrace.text.tools.parser import CallPart, ToolParser

MAX_TRIALS = 32  # tags in unclosed reasoning at which calls may begin
_CALL_TAGS = re.compile(f"{CALL}|{FUNCTION}")


class AnswerPart(msgspec.Struct, frozen=True):
    """What some text added. items: content and parts of calls in their order; reasoning comes
    before them.
    """

    reasoning: str = ""
    items: list[str | CallPart] = []

    @property
    def content(self) -> str:
        return "".join(one for one in self.items if isinstance(one, str))

    @property
    def calls(self) -> list[CallPart]:
        return [one for one in self.items if isinstance(one, CallPart)]


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
        if reasoning is not None and tools is not None:
            reasoning.hold_from((CALL, FUNCTION))

    @property
    def splits(self) -> bool:
        """Whether an answer may have other parts than content."""
        return self._reasoning is not None or self._tools is not None

    @property
    def reasons(self) -> bool:
        """Whether the answer begins with reasoning."""
        return self._reasoning is not None

    def feed(self, text: str, last: bool = False, cut: bool = False) -> AnswerPart:
        """What the text adds. last: the answer ends here. cut: the model did not end it, so that
        what is open stays open.
        """
        reasoning, content = "", text
        if self._reasoning is not None:
            reasoning, content = self._reasoning.feed(text, last)
            if last and self._reasoning.unclosed:
                reasoning, content = self._unclosed(self._reasoning.unclosed, cut)
        if self._tools is None:
            return AnswerPart(reasoning, [content] if content else [])
        items = self._tools.feed(content, last, cut)
        for part in items:
            if isinstance(part, str):
                continue
            if part.id is not None and part.name is not None:
                self.calls.append(Call(part.id, part.name))
            self.calls[part.index].arguments += part.arguments
        return AnswerPart(reasoning, items)

    def feed_piece(self, piece: Piece) -> AnswerPart:
        """As `feed`, of a piece of the output; one with a finish reason is the last."""
        reason = piece.finish_reason
        return self.feed(piece.text, last=reason is not None, cut=reason not in (None, "stop"))

    def _unclosed(self, text: str, cut: bool) -> tuple[str, str]:
        """Reasoning that never closed, divided where calls begin with which the answer ends."""
        assert self._tools is not None
        for found in islice(_CALL_TAGS.finditer(text), 0 if cut else MAX_TRIALS):
            items = self._tools.renewed().feed(text[found.start() :], last=True)
            content = "".join(one for one in items if isinstance(one, str))
            if not content.strip() and any(isinstance(one, CallPart) for one in items):
                return text[: found.start()].rstrip(), text[found.start() :]
        return text, ""
