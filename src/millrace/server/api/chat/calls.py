"""How /v1/chat/completions shows calls: of functions and of custom tools, whole or in parts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from millrace.server.api.response_schema import CalledCustom, CalledFunction, ToolCall
from millrace.text.answer_parser import Call
from millrace.text.tools.custom import InputReader
from millrace.text.tools.parser import CallPart


class CallFormatter:
    """The calls of one choice. custom: names of custom tools, whose calls have one text."""

    def __init__(self, custom: Collection[str] = ()) -> None:
        self._custom = custom
        self._inputs: dict[int, InputReader] = {}  # of custom tools, by the index of the call

    def whole(self, call: Call) -> ToolCall:
        """A call of an answer that is not streamed."""
        if call.name not in self._custom:
            function = CalledFunction(name=call.name, arguments=call.arguments)
            return ToolCall(id=call.id, type="function", function=function)
        reader = InputReader()
        reader.feed(call.arguments)
        reader.finish()
        custom = CalledCustom(name=call.name, input=reader.text)
        return ToolCall(id=call.id, type="custom", custom=custom)

    def deltas(self, parts: Sequence[CallPart], last: bool) -> list[ToolCall]:
        """What a chunk tells of calls, one entry for each. last: no chunk follows."""
        merged = _by_index(parts)
        for index in self._inputs if last else ():
            merged.setdefault(index, CallPart(index))
        deltas = (self._delta(part, last) for part in merged.values())
        return [one for one in deltas if one is not None]

    def _delta(self, part: CallPart, last: bool) -> ToolCall | None:
        if part.name is not None and part.name in self._custom:
            self._inputs[part.index] = InputReader()
        reader = self._inputs.get(part.index)
        if reader is None:
            return _function_delta(part)
        text = reader.feed(part.arguments) + (reader.finish() if last else "")
        if part.id is None or part.name is None:
            return ToolCall(index=part.index, custom=CalledCustom(input=text)) if text else None
        custom = CalledCustom(name=part.name, input=text)
        return ToolCall(index=part.index, id=part.id, type="custom", custom=custom)


def _function_delta(part: CallPart) -> ToolCall:
    if part.id is None or part.name is None:
        return ToolCall(index=part.index, function=CalledFunction(arguments=part.arguments))
    function = CalledFunction(name=part.name, arguments=part.arguments)
    return ToolCall(index=part.index, id=part.id, type="function", function=function)


def _by_index(parts: Sequence[CallPart]) -> dict[int, CallPart]:
    """The parts of a chunk, one for each call: clients may read an index only once in a chunk."""
    merged: dict[int, CallPart] = {}
    for part in parts:
        before = merged.get(part.index)
        merged[part.index] = (
            part
            if before is None
            else CallPart(
                part.index,
                id=before.id or part.id,
                name=before.name or part.name,
                arguments=before.arguments + part.arguments,
            )
        )
    return merged
