"""An answer as a list of blocks, each of one kind, opened and closed one after the other.

Anthropic's API and OpenAI's /v1/responses show answers like this; their formats are not known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from millrace.text.answer_parser import AnswerPart

Kind = Literal["reasoning", "content", "call"]
Action = Literal["open", "add", "close"]


class Block(msgspec.Struct):
    """One block so far. text: its content, or a call's arguments as JSON. id, name: of a call."""

    index: int
    kind: Kind
    text: str = ""
    id: str = ""
    name: str = ""


class Blocks:
    """Turns the parts of an answer, as they come, into changes of its blocks."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None

    @property
    def open(self) -> Block | None:
        """The block that is not closed yet."""
        return self._open

    def add_part(self, part: AnswerPart) -> Iterator[tuple[Action, Block, str]]:
        """(what happens, to which block, the text that is added) in order."""
        if part.reasoning:
            yield from self._append("reasoning", part.reasoning)
        for item in part.items:
            if isinstance(item, str):
                yield from self._append("content", item)
                continue
            if item.id is not None:
                yield from self._open_block("call", item.id, item.name or "")
            if item.arguments:
                yield from self._append("call", item.arguments)

    def close(self) -> Iterator[tuple[Action, Block, str]]:
        """No part follows."""
        closed, self._open = self._open, None
        if closed is not None:
            yield "close", closed, ""

    def _append(self, kind: Kind, text: str) -> Iterator[tuple[Action, Block, str]]:
        if self._open is None or self._open.kind != kind:
            yield from self._open_block(kind)
        block = self.all[-1]
        block.text += text
        yield "add", block, text

    def _open_block(
        self, kind: Kind, id: str = "", name: str = ""
    ) -> Iterator[tuple[Action, Block, str]]:
        yield from self.close()
        self._open = Block(len(self.all), kind, id=id, name=name)
        self.all.append(self._open)
        yield "open", self._open, ""
