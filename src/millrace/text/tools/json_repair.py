"""JSON as models write it, made valid as it comes.

Models write line breaks inside of texts, escapes that JSON has not, Python's literals and quotes,
commas too many, and leave out what closes. `JsonRepair` takes such a text in pieces and gives JSON;
valid JSON comes out with the same meaning. It knows no tools and no tags but those it is told.
"""

from __future__ import annotations

import json
import re
from typing import Any

_BARE = re.compile(r"[^\s,:{}\[\]()\"'<]+|<")
_UNICODE = (  # escapes; halves of a pair only together
    r"u(?![dD][89a-fA-F])[0-9a-fA-F]{4}"
    r"|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
_PLAIN = {  # what stands in a text as it does in JSON, by the quote around it
    '"': re.compile(rf'(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|{_UNICODE}))+'),
    "'": re.compile(rf"(?:[^\"'\\\x00-\x1f]|\\(?:[\"\\/bfnrt]|{_UNICODE}))+"),
}
_HALF = re.compile(r"u[dD][89a-fA-F][0-9a-fA-F]{2}")
_SPACE = re.compile(r"\s*")
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}
MAX_DIGITS = 4000  # of a number; Python reads no longer one
_LARGEST = "1.7976931348623157e308"
_CLOSERS = {"}": True, "]": False, ")": False}


def dump(value: Any) -> str:
    """A value as JSON text."""
    return json.dumps(value, ensure_ascii=False)


def word(text: str) -> str | None:
    """A bare word as JSON, Python's spellings included; None if it is no literal.

    A number beyond the range of a double becomes the largest one: every reader knows that.
    """
    known = _WORDS.get(text.lower())
    if known is not None or not NUMBER.fullmatch(text):
        return known
    if len(text) <= MAX_DIGITS + 1 and text.lstrip("-").isdigit():
        return text
    if len(text) > MAX_DIGITS or abs(float(text)) == float("inf"):
        return "-" * text.startswith("-") + _LARGEST
    return text


class _Level:
    """An object or an array that is open. keyed: a key waits for its value."""

    def __init__(self, is_object: bool) -> None:
        self.is_object = is_object
        self.items = 0
        self.keyed = False


class JsonRepair:
    """Rewrites one object or array, which must come first. ends: tags that end it outside of its
    texts, and inside of them where a line begins with one.

    done: it is closed. rest: what follows it. guesses: words and marks that had no place.
    """

    def __init__(self, ends: tuple[str, ...] = ()) -> None:
        self._ends = ends
        self._levels: list[_Level] = []
        self._quote = ""
        self._text = ""
        self._at = 0  # in the text
        self._given = 0  # characters
        self._key_at = 0  # where the last key began, with the comma before it
        self.done = False
        self.guesses = 0

    @property
    def rest(self) -> str:
        """What has not been taken yet; what follows the object if it is done."""
        return self._text[self._at :]

    def feed(self, text: str, last: bool = False) -> str:
        """The JSON that the text adds. last: nothing follows, so that all is closed."""
        self._text, self._at = self._text[self._at :] + text, 0
        made: list[str] = []
        while not self.done:
            step = self._in_text(last) if self._quote else self._token(last)
            if step is None:
                break
            made.append(step)
            self._given += len(step)
        if last and not self.done:
            made.append(self._close())
        return "".join(made)

    def complete(self, made: str) -> str | None:
        """What this has made, closed where the text was cut off: a key without a value is left out,
        a literal that has begun is completed. None if it was no JSON before.
        """
        rest = self.rest.strip()
        if self.guesses or (self.done and rest) or not (self.done or self._levels):
            return None
        if self._quote:
            made += '"'
        elif rest and not self.done:
            begun = next((one for one in _WORDS.values() if one.startswith(rest)), "null")
            if self._at_key():
                return None
            made += self._before(is_text=False) + (word(rest) or begun)
        if self._levels and self._levels[-1].keyed:
            made = made[: self._key_at]
        return made + "".join("}" if one.is_object else "]" for one in reversed(self._levels))

    # Each step takes some of the text and returns what it adds, or None if it needs more of it.

    def _token(self, last: bool) -> str | None:
        self._at = _space_end(self._text, self._at)
        if self._at == len(self._text):
            return None
        first = self._text[self._at]
        if first == "<" and self._ends:
            ended = self._end_at(self._at, last)
            if ended is not False:
                return None if ended is None else self._close()
        if first in "{[(":
            return self._open(first)
        if first in _CLOSERS:
            return self._take(1, self._pop(_CLOSERS[first]))
        if first in ",:":
            return self._take(1, self._mark(first))
        if first in "\"'":
            self._quote = first
            return self._take(1, self._before(is_text=True) + '"')
        return self._bare(last)

    def _open(self, first: str) -> str:
        before = self._before(is_text=False)
        self._levels.append(_Level(first == "{"))
        return self._take(1, before + ("{" if first == "{" else "["))

    def _bare(self, last: bool) -> str | None:
        found = _BARE.match(self._text, self._at)
        assert found is not None
        if found.end() == len(self._text) and not last:
            return None
        text = found.group()
        known = word(text)
        if known is None or self._at_key():
            self.guesses += 1
            return self._take(len(text), self._before(is_text=True) + dump(text))
        return self._take(len(text), self._before(is_text=False) + known)

    def _in_text(self, last: bool) -> str | None:
        if self._at == len(self._text):
            return None
        found = _PLAIN[self._quote].match(self._text, self._at)
        if found:
            return self._take(len(found.group()), found.group())
        char = self._text[self._at]
        if char == "\\":
            return self._wrong_escape(last)
        if char == self._quote:
            return self._quote_mark(last)
        if char == "\n" and self._ends:
            ended = self._end_at(_space_end(self._text, self._at), last)
            if ended is not False:
                return None if ended is None else self._close()
        return self._take(1, dump(char)[1:-1])

    def _wrong_escape(self, last: bool) -> str | None:
        following = self._text[self._at + 1 : self._at + 12]
        needed = 1 if following[:1] != "u" else 11 if _HALF.match(following) else 5
        if not last and len(following) < needed:
            return None
        if following[:1] == "'":
            return self._take(2, "'")
        if _HALF.match(following):  # of a pair that is no pair
            return self._take(6, "\\ufffd")
        return self._take(1, "\\\\")

    def _quote_mark(self, last: bool) -> str | None:
        """A quote ends a text where JSON could go on behind it, else it is a part of the text."""
        after = _space_end(self._text, self._at + 1)
        at_end = after == len(self._text)
        if at_end and not last:
            return None
        ends: bool | None = at_end or self._text[after] in ",:}])"
        ends = ends or "\n" in self._text[self._at + 1 : after]
        if not ends and self._ends:
            ends = self._end_at(after, last)
            if ends is None:
                return None
        if not ends:
            self.guesses += 1
            return self._take(1, '\\"' if self._quote == '"' else "'")
        self._quote = ""
        return self._take(1, '"')

    # --- what a token means where it stands -------------------------------------------------------

    def _at_key(self) -> bool:
        return bool(self._levels) and self._levels[-1].is_object and not self._levels[-1].keyed

    def _before(self, is_text: bool) -> str:
        """What goes before a value, or before a text that is a key."""
        if not self._levels:
            return ""
        level = self._levels[-1]
        if level.keyed:
            level.keyed = False
            return ": "
        comma = ", " if level.items else ""
        level.items += 1
        if not level.is_object:
            return comma
        level.keyed = is_text
        self._key_at = self._given
        self.guesses += not is_text
        return comma if is_text else comma + '"": '

    def _mark(self, mark: str) -> str:
        if mark == "," and self._levels and self._levels[-1].keyed:
            self.guesses += 1
            return self._missing()
        return ""

    def _missing(self) -> str:
        level = self._levels[-1]
        keyed, level.keyed = level.keyed, False
        return ": null" if keyed else ""

    def _pop(self, is_object: bool) -> str:
        """Close the innermost object or array, and what is open inside of it."""
        if not any(level.is_object == is_object for level in self._levels):
            self.guesses += 1
            return ""
        made = ""
        while True:
            made += self._missing()
            level = self._levels.pop()
            made += "}" if level.is_object else "]"
            if level.is_object == is_object:
                self.done = not self._levels
                return made
            self.guesses += 1

    def _close(self) -> str:
        made = '"' if self._quote else ""
        self._quote = ""
        self.guesses += 1
        while self._levels:
            made += self._missing() + ("}" if self._levels.pop().is_object else "]")
        self.done = True
        return made

    def _end_at(self, at: int, last: bool) -> bool | None:
        if self._text.startswith(self._ends, at):
            return True
        begun = self._text[at : at + max(map(len, self._ends))]
        return None if not last and any(end.startswith(begun) for end in self._ends) else False

    def _take(self, count: int, made: str) -> str:
        self._at += count
        return made


def _space_end(text: str, at: int) -> int:
    """The first position from `at` that is no white space."""
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def repaired(text: str) -> tuple[str, int] | None:
    """(JSON, guesses) of a text that is one object or array; None if it is none."""
    if text[:1] not in ("{", "[", "("):
        return None
    repair = JsonRepair()
    try:
        made = repair.feed(text, last=True)
    except RecursionError:
        return None
    return None if repair.rest.strip() else (made, repair.guesses)


def completed(text: str) -> str | None:
    """The JSON of an object or array that may have been cut off; None if it is none."""
    if text[:1] not in ("{", "["):
        return None
    repair = JsonRepair()
    return repair.complete(repair.feed(text))
