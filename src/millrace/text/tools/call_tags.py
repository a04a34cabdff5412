"""The tags of a tool call in a model's text, and which of them stand for themselves.

A value may hold any text, tags among it, and a model may leave out a tag. So a tag inside a value
ends it only where the format could go on: a closing tag that another tag or the end of the answer
follows, or an opening tag that names what is declared. Every function here answers the same
however the text was cut: None means that more text must come before it can be told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container

CALL = "<tool_call>"
CALL_END = "</tool_call>"
FUNCTION = "<function="
FUNCTION_END = "</function>"
PARAMETER = "<parameter="
PARAMETER_END = "</parameter>"

TAGS = (CALL, CALL_END, FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END)
CLOSING = (PARAMETER_END, FUNCTION_END, CALL_END)
MAX_NAME = 128  # characters of a function's or a parameter's name

_NAME_FIELD = '{"name":"'
_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"([^<>\n]*)(>|(?=[<\n]))")
_LITERAL = re.compile(r'"(?:[^"\\\n]|\\[^\n])*("|\n|\\?\Z)')
_TEXT_LITERAL = re.compile(r'"(?:[^"\\\n]|\\[^\n])*"')


def after_space(text: str, at: int = 0) -> int:
    """The first position from `at` that is no white space."""
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def begins(text: str, at: int, tags: tuple[str, ...], last: bool) -> bool | None:
    """Whether one of the tags stands at a position."""
    if text.startswith(tags, at):
        return True
    rest = len(text) - at
    longest = max(map(len, tags))
    if last or rest >= longest:
        return False
    begun = text[at:]
    return None if any(tag.startswith(begun) for tag in tags) else False


def followed(text: str, at: int, tags: tuple[str, ...], last: bool) -> bool | None:
    """Whether one of the tags, or the end of the answer, stands behind white space."""
    at = after_space(text, at)
    if at == len(text):
        return True if last else None
    return begins(text, at, tags, last)


def name_at(text: str, at: int, last: bool) -> tuple[str, int] | bool | None:
    """(name, where what follows it begins) of an opening tag whose `=` ends at `at`.

    The closing `>` may be missing at the end of a line or before another tag. None: undecided.
    False: there is no name.
    """
    found = _NAME.match(text, at)
    if found is None or (found.end() == len(text) and not found.group(2) and not last):
        return None if not last and len(text) - at <= MAX_NAME else False
    name = found.group(1).strip().strip("\"'")
    if not name or len(name) > MAX_NAME:
        return False
    return name, found.end()


class ValueEnd:
    """Finds the tag that ends a parameter's value.

    opens: whether an opening tag of a parameter of that name ends the value; its second argument
    says whether it begins a line. functions: the names of the functions that can be called.
    quoted: tags inside of the value's JSON texts do not count, unless a line begins with them.
    """

    def __init__(
        self, opens: Callable[[str, bool], bool], functions: Container[str], quoted: bool
    ) -> None:
        self._opens = opens
        self._functions = functions
        self._quoted = quoted
        self._open = Counter[str]()  # elements of the value's own, by their closing tags

    def find(self, text: str, line_start: bool, last: bool, at: int = 0) -> tuple[int, bool]:
        """(characters that belong to the value for certain, whether the tag that ends it follows).

        line_start: the text begins a line. at: there is no such tag before this position.
        """
        while (at := text.find("<", at)) >= 0:
            verdict = self._ends(text, at, line_start, last)
            if verdict is not False and self._quoted:
                inside = _in_literal(text, at, last)
                verdict = None if inside is None else verdict and not inside
            if verdict is not False:
                return at, bool(verdict)
            at += 1
        return len(text), False

    def passed(self, text: str) -> None:
        """This much of the value has been taken; what `find` is given next follows it."""
        for tag in CLOSING:
            self._open[tag] += _still_open(text, tag)

    def _closes(self, text: str, at: int, tag: str, line_start: bool, last: bool) -> bool | None:
        """Whether a closing tag ends the value. Alone on a line it does, even if the format cannot
        go on behind it, unless the value has opened an element of that name.
        """
        ends = followed(text, at + len(tag), TAGS, last)
        if ends is not False or not line_start:
            return ends
        after = after_space(text, at + len(tag))
        alone = "\n" in text[at + len(tag) : after]
        return alone and self._open[tag] + _still_open(text[:at], tag) <= 0

    def _ends(self, text: str, at: int, line_start: bool, last: bool) -> bool | None:
        known = begins(text, at, TAGS, last)
        if not known:
            return known
        line_start = text[at - 1] == "\n" if at else line_start
        for tag in CLOSING:
            if text.startswith(tag, at):
                return self._closes(text, at, tag, line_start, last)
        if text.startswith(PARAMETER, at):
            name = name_at(text, at + len(PARAMETER), last)
            return self._opens(name[0], line_start) if isinstance(name, tuple) else name
        if not line_start:
            return False
        if text.startswith(FUNCTION, at):
            return self._calls(text, at, last)
        at = after_space(text, at + len(CALL))
        if at == len(text):
            return None if not last else False
        if text[at] == "{":
            json_name = _json_name(text[at : at + 2 * MAX_NAME], last)
            return json_name in self._functions if isinstance(json_name, str) else json_name
        known = begins(text, at, (FUNCTION,), last)
        return self._calls(text, at, last) if known else known

    def _calls(self, text: str, at: int, last: bool) -> bool | None:
        name = name_at(text, at + len(FUNCTION), last)
        return name[0] in self._functions if isinstance(name, tuple) else name


def _still_open(text: str, closing: str) -> int:
    """Elements that a text opens, less those that it closes."""
    return text.count(closing.replace("</", "<")[:-1]) - text.count(closing)


def _json_name(text: str, last: bool) -> str | bool | None:
    """The name in the begin of a call as JSON. None: undecided. False: it begins otherwise."""
    packed = "".join(text.split())
    if not packed.startswith(_NAME_FIELD):
        return None if _NAME_FIELD.startswith(packed) and not last else False
    name, closed, _ = packed[len(_NAME_FIELD) :].partition('"')
    return name if closed else None if not last and len(text) < 2 * MAX_NAME else False


def _in_literal(text: str, at: int, last: bool) -> bool | None:
    """Whether a position is inside of a JSON text that begins and ends on its line."""
    start = text.rfind("\n", 0, at) + 1
    while True:
        found = _LITERAL.search(text, start)
        if found is None or found.start() >= at:
            return False
        if found.end() > at:
            closed = found.group(1) == '"'
            undecided = not closed and found.group(1) != "\n" and not last
            return None if undecided else closed
        start = found.end()


def text_literal(text: str) -> int:
    """Characters of the JSON text of one line that the text begins with; 0 if it does not, and -1
    if it may still become one."""
    found = _TEXT_LITERAL.match(text)
    if found:
        return found.end()
    begun = _LITERAL.match(text)
    return -1 if begun and begun.group(1) in ("", "\\") else 0
