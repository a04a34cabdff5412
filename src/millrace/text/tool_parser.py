"""Tool calls in a model's answer, found as the text comes.

Qwen's models write a call in one of two formats, and this parser reads both:

    <tool_call>                              <tool_call>
    <function=NAME>                          {"name": NAME, "arguments": {...}}
    <parameter=KEY>                          </tool_call>
    value
    </parameter>
    </function>
    </tool_call>

In the first a value is bare text; the tool's schema says which JSON type it has. The result is the
same however the text is cut into pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal
from uuid import uuid4

import msgspec

from millrace.text.tool_schema import Tool

ToolCallParser = Literal["auto", "qwen3_coder", "qwen3_xml", "hermes", "none"]

CALL = "<tool_call>"
CALL_END = "</tool_call>"
FUNCTION = "<function="
FUNCTION_END = "</function>"
PARAMETER = "<parameter="
PARAMETER_END = "</parameter>"

_NAME_FIRST = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


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
        self._xml = parser in ("auto", "qwen3_coder", "qwen3_xml")
        self._json = parser in ("auto", "hermes")
        self._held = ""
        self._state: Callable[[], bool] = self._in_content
        self._content: list[str] = []
        self._parts: list[CallPart] = []
        self._index = -1

    @property
    def calls(self) -> int:
        """Calls begun so far."""
        return self._index + 1

    def feed(self, text: str, last: bool = False) -> tuple[str, list[CallPart]]:
        """(content, parts of calls) that the text adds. last: the answer ends here."""
        self._held += text
        while self._state():  # each state takes what it can, and says whether another may go on
            pass
        if last:
            self._finish()
        content, parts = "".join(self._content), self._parts
        self._content, self._parts = [], []
        return content, parts

    # Each state looks at the held text and returns True if it took some of it or changed the state.

    def _in_content(self) -> bool:
        before, found, after = self._held.partition(CALL)
        if found:
            self._content.append(before.rstrip())
            self._held = after
            self._before = before[len(before.rstrip()) :]
            self._state = self._call_opened
            return True
        keep = _certain(self._held, CALL)
        self._content.append(self._held[:keep])
        self._held = self._held[keep:]
        return False

    def _call_opened(self) -> bool:
        """Right behind `<tool_call>`: which of the two formats is it?"""
        body = self._held.lstrip()
        if self._xml and body.startswith(FUNCTION):
            end = body.find(">")
            if end >= 0:
                self._begin(body[len(FUNCTION) : end].strip())
                self._held = body[end + 1 :]
                self._fields = 0
                self._state = self._between_parameters
                return True
            return self._no_call_if(len(body) > 1000)
        if self._json and body.startswith("{"):
            self._state = self._json_body
            return True
        undecided = not body or (self._xml and FUNCTION.startswith(body))
        return self._no_call_if(not undecided)

    def _no_call_if(self, certain: bool) -> bool:
        """What follows the marker is not a call: both are content."""
        if certain:
            self._content.append(self._before + CALL)
            self._state = self._in_content
        return certain

    # --- <function=NAME> --------------------------------------------------------------------------

    def _between_parameters(self) -> bool:
        body = self._held.lstrip()
        if body.startswith(PARAMETER):
            end = body.find(">")
            if end < 0:
                return False
            self._open_parameter(body[len(PARAMETER) : end].strip())
            self._held = body[end + 1 :]
            return True
        for marker in (FUNCTION_END, CALL_END):
            if body.startswith(marker):
                self._part("}" if self._fields else "{}")
                self._held = body[len(marker) :]
                self._state = self._call_closed if marker == FUNCTION_END else self._after_call
                return True
        markers = (PARAMETER, FUNCTION_END, CALL_END)
        if body and not any(marker.startswith(body) for marker in markers):
            at = body.find("<", 1)  # stray text inside a call means nothing
            self._held = body[at:] if at > 0 else ""
            return bool(self._held)
        return False

    def _open_parameter(self, key: str) -> None:
        tool = self._tools.get(self._name)
        types = tool.property_types(key) if tool else frozenset[str]()
        self._types = types
        self._streams = types <= {"string"}
        name = f"{', ' if self._fields else '{'}{_dump(key)}: "
        self._fields += 1
        self._part(name + '"' if self._streams else name)
        self._state = self._parameter_opened

    def _parameter_opened(self) -> bool:
        """Directly behind `<parameter=KEY>`, where a line break may still come."""
        if not self._held:
            return False
        self._held = self._held.removeprefix("\n")
        self._state = self._in_parameter
        return True

    def _in_parameter(self) -> bool:
        value, found, after = self._held.partition(PARAMETER_END)
        if found:
            value = value.removesuffix("\n")
            self._part(_inner(value) + '"' if self._streams else _typed(value, self._types))
            self._held = after
            self._state = self._between_parameters
            return True
        if self._streams:
            keep = _certain(self._held, "\n" + PARAMETER_END, PARAMETER_END)
            self._part(_inner(self._held[:keep]))
            self._held = self._held[keep:]
        return False

    # --- {"name": ..., "arguments": ...} ----------------------------------------------------------

    def _json_body(self) -> bool:
        found = _NAME_FIRST.match(self._held)
        if found:
            self._begin(json.loads(found.group(1), strict=False))
            self._held = self._held[found.end() :]
            self._scan = _ObjectScan()
            self._state = self._json_arguments
            return True
        if CALL_END not in self._held:
            return False
        body, _, after = self._held.partition(CALL_END)
        if self._whole_call(body):
            self._held = after
            self._state = self._after_call
            return True
        return self._no_call_if(True)

    def _whole_call(self, body: str) -> bool:
        """A call whose arguments do not come last or are no object: taken at its end."""
        try:
            call = json.loads(body, strict=False)
        except (ValueError, RecursionError):
            return False
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return False
        given = call.get("arguments", call.get("parameters", {}))
        self._begin(call["name"])
        self._part(given if isinstance(given, str) else _dump(given))
        return True

    def _json_arguments(self) -> bool:
        taken = self._scan.take(self._held)
        self._part(self._held[:taken])
        self._held = self._held[taken:]
        if self._scan.done:
            self._state = self._call_closed
        return self._scan.done

    # --- behind a call ----------------------------------------------------------------------------

    def _call_closed(self) -> bool:
        """The arguments are whole; up to the closing marker nothing means anything."""
        before, found, after = self._held.partition(CALL_END)
        if found:
            self._held = after
            self._state = self._after_call
        else:
            self._held = self._held[_certain(before, CALL_END) :]
        return bool(found)

    def _after_call(self) -> bool:
        """White space between calls is no word."""
        self._held = self._held.lstrip()
        if self._held:
            self._state = self._in_content
        return bool(self._held)

    def _finish(self) -> None:
        """Nothing follows: held text belongs to the call that has begun, else to the content."""
        if self._state == self._in_content:
            self._content.append(self._held)
        elif self._state in (self._call_opened, self._json_body):
            self._content.append(self._before + CALL + self._held)
        elif self._state == self._in_parameter:
            # Cut off: what there is of a text is shown, as it would be if it had been streamed.
            self._part(_inner(self._held) if self._streams else "")
        elif self._state == self._between_parameters:
            self._part("}" if self._fields else "{}")
        self._held = ""

    def _begin(self, name: str) -> None:
        self._index += 1
        self._name = name
        self._parts.append(CallPart(self._index, id=f"call_{uuid4().hex[:24]}", name=name))

    def _part(self, arguments: str) -> None:
        if arguments:
            self._parts.append(CallPart(self._index, arguments))


class _ObjectScan:
    """Finds where a JSON object ends, piece by piece."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_text = self._escaped = False
        self.done = False

    def take(self, text: str) -> int:
        """Characters of `text` that belong to the object."""
        for at, char in enumerate(text):
            if self._in_text:
                self._in_text = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_text = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.done = True
                    return at + 1
        return len(text)


def _certain(text: str, *markers: str) -> int:
    """Characters of `text` before white space and what may begin one of the markers at its end."""
    keep = len(text)
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), 0, -1):
            if text.endswith(marker[:length]):
                keep = min(keep, len(text) - length)
                break
    return len(text[:keep].rstrip())


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _inner(text: str) -> str:
    """The text as it stands between the quotes of a JSON text."""
    return _dump(text)[1:-1]


def _typed(value: str, types: frozenset[str]) -> str:
    """A bare value as JSON of one of its types; as a text where it is none of them."""
    try:
        parsed: Any = json.loads(value, parse_constant=_no_number)
    except (ValueError, RecursionError):
        parsed = _PYTHON.get(value.strip(), value)
    if isinstance(parsed, str) or ("string" in types and not _json_types(parsed) & types):
        parsed = value
    return _dump(parsed)


_PYTHON = {"True": True, "False": False, "None": None}


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _json_types(value: Any) -> set[str]:
    """The names of a value's type in JSON Schema; texts are not asked about."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, (int, float)):
        return {"number"} if value != int(value) else {"integer", "number"}
    if value is None:
        return {"null"}
    return {"object" if isinstance(value, dict) else "array"}
