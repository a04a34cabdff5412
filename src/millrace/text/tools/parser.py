"""Tool calls in a model's answer, found as the text comes.

Qwen's models write a call in one of two formats, and this parser reads both:

    <tool_call>                              <tool_call>
    <function=NAME>                          {"name": NAME, "arguments": {...}}
    <parameter=KEY>                          </tool_call>
    value
    </parameter>
    </function>
    </tool_call>

In the first a value is bare text; the tool's schema says which JSON type it has. Tags may be
missing, doubled or part of a value: a call that has a name is never lost, what belongs to none is
content, and the arguments of a call that ended are valid JSON. The result is the same however the
text is cut into pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Literal
from uuid import uuid4

import msgspec

from millrace.text.tools.call_tags import (
    CALL,
    CALL_END,
    CLOSING,
    FUNCTION,
    FUNCTION_END,
    PARAMETER,
    PARAMETER_END,
    TAGS,
    ValueEnd,
    after_space,
    begins,
    name_at,
)
from millrace.text.tools.json_repair import JsonRepair, dump, repaired
from millrace.text.tools.json_schema import TEXT
from millrace.text.tools.parameter import ParameterValue
from millrace.text.tools.schema import Tool

ToolCallParser = Literal["auto", "qwen3_coder", "qwen3_xml", "hermes", "none"]

_NAME_FIRST = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\\n]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_JSON_ENDS = (CALL_END, CALL)


class CallPart(msgspec.Struct, frozen=True):
    """What is new of one call. id and name stand in a call's first part, and only there."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class ToolParser:
    """Splits one answer into content and calls. White space before a call belongs to neither.

    parser: which of the two formats is read; auto reads both. What looks like a call but is not
    one stays content.
    """

    def __init__(self, tools: Sequence[Tool], parser: ToolCallParser = "auto") -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._parser = parser
        self._xml = parser in ("auto", "qwen3_coder", "qwen3_xml")
        self._json = parser in ("auto", "hermes")
        self._held = ""
        self._last = False
        self._state: Callable[[], bool] = self._in_content
        self._made: list[str | CallPart] = []
        self._index = -1
        self._opener = ""  # what has been taken of what may yet be no call
        self._in_block = False  # a <tool_call> is open

    @property
    def calls(self) -> int:
        """Calls begun so far."""
        return self._index + 1

    def renewed(self) -> ToolParser:
        """A parser of the same tools and formats at its beginning."""
        return ToolParser(list(self._tools.values()), self._parser)

    def feed(self, text: str, last: bool = False, cut: bool = False) -> list[str | CallPart]:
        """Content and parts of calls, in their order, that the text adds.

        last: the answer ends here. cut: it ends before the model ended it, so that an open call
        stays open.
        """
        self._held += text
        self._last = last and not cut
        while self._state():  # each state takes what it can, and says whether another may go on
            pass
        if last:
            self._finish(cut)
        made, self._made = self._made, []
        return [one for one in made if one]

    # Each state looks at the held text and returns True if it took some of it or changed the state.

    def _in_content(self) -> bool:
        at = -1
        while (at := self._held.find("<", at + 1)) >= 0:
            verdict = self._call_at(at)
            if verdict is not False:
                return self._show_until(at, bool(verdict))
        self._show(len(self._held.rstrip()))
        return False

    def _call_at(self, at: int) -> bool | None:
        """Whether a call begins at a position of the content, or an open block ends."""
        tags = (CALL, FUNCTION, CALL_END) if self._in_block else (CALL, FUNCTION)
        known = begins(self._held, at, tags if self._xml else tags[::2], self._last)
        if not known or not self._held.startswith(FUNCTION, at):
            return known
        name = name_at(self._held, at + len(FUNCTION), self._last)
        if not isinstance(name, tuple):
            return name
        if name[0] not in self._tools:
            return False
        if not self._last and after_space(self._held, name[1]) == len(self._held):
            return None
        return begins(self._held, after_space(self._held, name[1]), (PARAMETER, *CLOSING),
                      self._last)  # fmt: skip

    def _show_until(self, at: int, certain: bool) -> bool:
        """Show the content before a tag, and go on there if it is one for certain."""
        shown = len(self._held[:at].rstrip())
        self._show(shown)
        if not certain:
            return False
        at -= shown
        if self._held.startswith(CALL_END, at):
            self._take(at + len(CALL_END))
            self._in_block = False
            return True
        self._opener = ""
        if self._held.startswith(CALL, at):
            self._open_block(at + len(CALL))
        else:
            self._opener = self._held[:at]
            self._take(at)
        self._state = self._call_opened
        return True

    def _open_block(self, count: int) -> None:
        self._opener += self._held[:count]
        self._take(count)
        self._in_block = True

    def _call_opened(self) -> bool:
        """Where a call's body begins: which of the two formats is it?"""
        at = after_space(self._held)
        if self._held.startswith(CALL, at):
            self._open_block(at + len(CALL))
            return True
        if self._xml and self._held.startswith(FUNCTION, at):
            name = name_at(self._held, at + len(FUNCTION), self._last)
            if isinstance(name, tuple):
                self._take(name[1])
                self._begin(name[0])
                return True
            return self._no_call_if(name is False)
        if self._json and self._held.startswith(("{", "["), at):
            self._whole = JsonRepair(_JSON_ENDS)
            self._written, self._read = "", 0
            self._state = self._json_body
            return True
        tags = (CALL, FUNCTION) if self._xml else (CALL,)
        undecided = at == len(self._held) or begins(self._held, at, tags, self._last) is None
        return self._no_call_if(not undecided)

    def _no_call_if(self, certain: bool) -> bool:
        """What follows the tag is no call: both are content after all."""
        if certain:
            self._made.append(self._opener)
            self._opener, self._in_block = "", False
            self._state = self._in_content
        return certain

    # --- <function=NAME> --------------------------------------------------------------------------

    def _function_opened(self) -> bool:
        """Directly behind `<function=NAME>`; some models write the arguments as JSON there."""
        at = after_space(self._held)
        if at == len(self._held):
            return False
        self._take(at)
        self._state = self._between_parameters
        if self._held.startswith("{"):
            self._scan_arguments(self._after_call)
        return True

    def _between_parameters(self) -> bool:
        at = after_space(self._held)
        if self._held.startswith(PARAMETER, at):
            name = name_at(self._held, at + len(PARAMETER), self._last)
            if isinstance(name, tuple):
                self._take(name[1])
                self._open_parameter(name[0])
                return True
            if name is None:
                return False
        elif self._held.startswith((FUNCTION_END, CALL_END, FUNCTION, CALL), at):
            self._part("}" if self._given else "{}")
            self._take(at + len(FUNCTION_END) * self._held.startswith(FUNCTION_END, at))
            self._state = self._after_call
            return True
        elif at == len(self._held) or begins(self._held, at, TAGS, self._last) is None:
            return False
        next_tag = self._held.find("<", at + 1)  # stray text inside a call means nothing
        self._take(next_tag if next_tag > 0 else len(self._held))
        return bool(self._held)

    def _open_parameter(self, key: str) -> None:
        tool = self._tools.get(self._name)
        self._value = ParameterValue(
            tool.argument_types(key) if tool else TEXT,
            lambda quoted: ValueEnd(self._opens_parameter, self._tools, quoted),
        )
        self._given_again = key in self._given  # the first one holds
        self._value_part(f"{', ' if self._given else '{'}{dump(key)}: {self._value.opening}")
        self._given.add(key)
        self._state = self._in_value

    def _opens_parameter(self, name: str, line_start: bool) -> bool:
        """Whether `<parameter=NAME>` inside of a value is the next one. A text may speak of it."""
        tool = self._tools.get(self._name)
        if tool is not None and name not in self._given and tool.names_argument(name):
            return True
        lists_others = tool is not None and tool.lists_arguments
        return line_start and not (self._value.streams and lists_others)

    def _in_value(self) -> bool:
        made, taken = self._value.read(self._held, self._last)
        self._value_part(made)
        self._take(taken)
        if self._value.ended:
            self._held = self._held.removeprefix(PARAMETER_END)
            self._state = self._between_parameters
        return self._value.ended

    def _value_part(self, text: str) -> None:
        if not self._given_again:
            self._part(text)

    # --- {"name": ..., "arguments": ...} ----------------------------------------------------------

    def _json_body(self) -> bool:
        found = _NAME_FIRST.match(self._held)
        name = _text(found.group(1)) if found else None
        if found and name:
            self._take(found.end())
            self._begin(name)
            self._scan_arguments(self._behind_json)
            return True
        self._written += self._whole.feed(self._held[self._read :])
        self._read = len(self._held)
        if not self._whole.done:
            return self._no_call_if(self._last)
        calls = _whole_calls(self._written)
        if not calls:
            return self._no_call_if(True)
        self._held = self._whole.rest
        for name, arguments in calls:
            self._begin(name)
            self._part(arguments)
        self._state = self._after_call
        return True

    def _scan_arguments(self, behind: Callable[[], bool]) -> None:
        """behind: the state that follows the arguments."""
        self._scan = JsonRepair((*_JSON_ENDS, FUNCTION_END))
        self._behind_arguments = behind
        self._state = self._json_arguments

    def _json_arguments(self) -> bool:
        self._part(self._scan.feed(self._held))
        self._held = self._scan.rest if self._scan.done else ""
        if self._scan.done:
            self._state = self._behind_arguments
        return self._scan.done

    def _behind_json(self) -> bool:
        """Behind the arguments: other fields, and what closes the call."""
        at = after_space(self._held)
        if at == len(self._held):
            return False
        self._state = self._after_call
        if self._held[at] in ",}":
            self._scan = JsonRepair((*_JSON_ENDS, FUNCTION_END))
            self._scan.feed("{")
            self._state = self._other_fields
        return True

    def _other_fields(self) -> bool:
        self._scan.feed(self._held)
        self._held = self._scan.rest if self._scan.done else ""
        if self._scan.done:
            self._state = self._after_call
        return self._scan.done

    # --- behind a call ----------------------------------------------------------------------------

    def _after_call(self) -> bool:
        """White space and closing tags between calls are no content."""
        at = after_space(self._held)
        if at == len(self._held):
            return False
        for tag in CLOSING:
            if self._held.startswith(tag, at):
                self._take(at + len(tag))
                self._in_block = self._in_block and tag != CALL_END
                return True
        tags = (*CLOSING, FUNCTION) if self._in_block and self._xml else CLOSING
        known = begins(self._held, at, tags, self._last)
        if known is None:
            return False
        self._take(at)
        again = known or (self._in_block and self._json and self._held[0] == "{")
        self._opener = ""
        self._state = self._call_opened if again else self._in_content
        return True

    def _finish(self, cut: bool) -> None:
        """Nothing follows: what is held is content if no call has begun, and else belongs to it."""
        if self._state == self._in_content:
            self._made.append(self._held)
        elif self._state in (self._call_opened, self._json_body):
            self._made.append(self._opener + self._held)
        elif self._state == self._json_arguments and not cut:
            self._part(self._scan.feed("", last=True))
        elif self._state == self._in_value:
            self._value_part(self._value.finish(self._held, cut))
            self._part("" if cut else "}")
        elif self._state in (self._function_opened, self._between_parameters) and not cut:
            self._part("}" if self._given else "{}")
        self._held = ""
        self._state = self._in_content

    def _begin(self, name: str) -> None:
        self._index += 1
        self._name = name
        self._opener = ""
        self._given: set[str] = set()
        self._made.append(CallPart(self._index, id=f"call_{uuid4().hex[:24]}", name=name))
        self._state = self._function_opened

    def _part(self, arguments: str) -> None:
        if arguments:
            self._made.append(CallPart(self._index, arguments))

    def _show(self, count: int) -> None:
        self._made.append(self._held[:count])
        self._take(count)

    def _take(self, count: int) -> None:
        self._held = self._held[count:]


def _text(literal: str) -> str | None:
    try:
        return str(json.loads(literal, strict=False))
    except ValueError:
        return None


def _whole_calls(written: str) -> list[tuple[str, str]]:
    """(name, arguments) of a call, or of a list of them, that is whole; empty if it is none."""
    try:
        given = json.loads(written)
    except (ValueError, RecursionError):
        return []
    calls = given if isinstance(given, list) else [given]
    found = []
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
            return []
        found.append((call["name"], _arguments(call.get("arguments", call.get("parameters")))))
    return found


def _arguments(given: object) -> str:
    """A call's arguments as JSON; some models write JSON into a text."""
    if given is None:
        return "{}"
    if isinstance(given, str):
        found = repaired(given.strip())
        return found[0] if found else dump(given)
    return dump(given)
