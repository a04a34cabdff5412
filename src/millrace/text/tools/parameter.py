"""One parameter's value in Qwen's format, read as it comes: from its opening tag to its end.

A text is given on as it comes. Other values are JSON, which is known once it is whole. Knows no
calls; who may follow is told by a `ValueEnd`.
"""

from __future__ import annotations

from collections.abc import Callable

from millrace.text.tools.call_tags import TAGS, ValueEnd, after_space, followed, text_literal
from millrace.text.tools.json_repair import dump
from millrace.text.tools.json_schema import TEXT
from millrace.text.tools.values import read_text, read_value


class ParameterValue:
    """Reads the value behind `<parameter=KEY>`.

    types: those that its schema allows. value_end: makes what finds its end; the argument says
    whether tags inside of JSON's quotes do not count. ended: nothing of it follows.
    """

    def __init__(self, types: frozenset[str], value_end: Callable[[bool], ValueEnd]) -> None:
        self._types = types
        self._value_end = value_end
        self.streams = types <= TEXT
        self.ended = False
        self._step = self._line_break
        self._end = value_end(False)
        self._line_start = True
        self._searched = 0  # there is no end before this position of the text

    @property
    def opening(self) -> str:
        """The JSON that stands before the value itself."""
        return '"' if self.streams else ""

    def read(self, text: str, last: bool) -> tuple[str, int]:
        """(JSON, characters of the text that it took). What was not taken comes again, with more
        behind it. last: nothing does.
        """
        return self._step(text, last)

    def finish(self, text: str, cut: bool) -> str:
        """The JSON of what was not taken when the answer ends. cut: the value has not ended."""
        if cut and not self.streams:
            return ""
        if cut:
            certain, _ = self._end.find(text, self._line_start, last=False)
            return dump(text[:certain].removesuffix("\n"))[1:-1]
        return self._whole(text)

    def _whole(self, text: str) -> str:
        value = text.removesuffix("\n")
        return dump(value)[1:] if self.streams else read_value(value, self._types)

    # Each step reads what it can, and hands on to the next one.

    def _line_break(self, text: str, last: bool) -> tuple[str, int]:
        """One line break before the value belongs to the format."""
        if not text and not last:
            return "", 0
        self._step = self._begin
        if not text.startswith("\n"):
            return self._begin(text, last)
        made, taken = self._begin(text[1:], last)
        return made, taken + 1

    def _begin(self, text: str, last: bool) -> tuple[str, int]:
        if not text and not last:
            return "", 0
        self._end = self._value_end(not self.streams and text[:1] in ("{", "[", '"'))
        self._step = self._literal if self.streams and text[:1] == '"' else self._inside
        return self._step(text, last)

    def _literal(self, text: str, last: bool) -> tuple[str, int]:
        """A text in quotes: they are taken off if it needs them."""
        length = text_literal(text)
        ends = followed(text, length, TAGS, last) if length > 0 else False
        if ends is None or (length < 0 and not last):
            return "", 0
        content = read_text(text[:length], self._types)
        if ends and content != text[:length]:
            self.ended = True
            return dump(content)[1:], after_space(text, length)
        self._step = self._inside
        return self._inside(text, last)

    def _inside(self, text: str, last: bool) -> tuple[str, int]:
        certain, self.ended = self._end.find(text, self._line_start, last, self._searched)
        if self.ended:
            return self._whole(text[:certain]), certain
        if not self.streams:
            self._searched = certain
            return "", 0
        certain -= text[:certain].endswith("\n")  # it may stand before the closing tag
        if certain:
            self._line_start = text[certain - 1] == "\n"
            self._end.passed(text[:certain])
        return dump(text[:certain])[1:-1], certain
