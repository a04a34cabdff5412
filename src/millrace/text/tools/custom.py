"""The input of a custom tool, which is one text, out of a call's arguments, which are JSON.

A model calls a custom tool as it calls a function with one parameter. Knows neither models' ways of
calling nor APIs.
"""

from __future__ import annotations

import json
import re
from typing import Literal

from millrace.text.tools.json_repair import dump

INPUT = "input"  # the name of the parameter

_HEAD = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_LONGEST_HEAD = 64  # characters; with more white space in it the text is read at its end
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


class InputReader:
    """Takes the JSON of a call's arguments as it comes. text: the input so far.

    Where the arguments do not begin with the input, it is known once they are whole.
    """

    def __init__(self) -> None:
        self.text = ""
        self._state: Literal["head", "text", "end", "other"] = "head"
        self._arguments = ""  # all of them, until the input is found
        self._held = ""

    def feed(self, arguments: str) -> str:
        """What these arguments add to the text."""
        if self._state == "head":
            self._arguments += arguments
            self._find_head()
        elif self._state == "other":
            self._arguments += arguments
        else:
            self._held += arguments
        added = self._unescaped() if self._state == "text" else ""
        self.text += added
        return added

    def finish(self) -> str:
        """What is left to add when no arguments follow."""
        if self._state in ("text", "end"):
            return ""
        self._state = "end"
        self.text = _input_of(self._arguments)
        return self.text

    def _find_head(self) -> None:
        found = _HEAD.match(self._arguments)
        if found:
            self._state, self._held = "text", self._arguments[found.end() :]
        elif len(self._arguments) > _LONGEST_HEAD:
            self._state = "other"

    def _unescaped(self) -> str:
        """The characters of the held JSON text, up to its closing quote or half an escape."""
        made: list[str] = []
        at = 0
        while at < len(self._held):
            char = self._held[at]
            if char == '"':
                self._state, at = "end", len(self._held)
            elif char != "\\":
                made.append(char)
                at += 1
            else:
                found = self._escape(at)
                if found is None:
                    break
                made.append(found[0])
                at += found[1]
        self._held = self._held[at:]
        return "".join(made)

    def _escape(self, at: int) -> tuple[str, int] | None:
        """(characters, length) of the escape at a position; None if it is not whole."""
        kind = self._held[at + 1 : at + 2]
        if kind != "u":
            return (_ESCAPES.get(kind, kind), 2) if kind else None
        digits = self._held[at + 2 : at + 6]
        if len(digits) < 4:
            return None
        high = 0xD800 <= int(digits, 16) < 0xDC00
        length = 12 if high else 6
        if high and len(self._held) < at + length:
            return None
        return str(json.loads(f'"{self._held[at : at + length]}"')), length


def _input_of(arguments: str) -> str:
    """The input in whole arguments; all of them where none is named so."""
    try:
        given = json.loads(arguments or "{}")
    except (ValueError, RecursionError):  # cut off before the input, or no JSON at all
        return "" if arguments.lstrip().startswith("{") else arguments
    if not isinstance(given, dict) or (given and INPUT not in given):
        return arguments
    found = given.get(INPUT, "")
    return found if isinstance(found, str) else dump(found)
