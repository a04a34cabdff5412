"""The tools that a chat offers: checked once, with the types that their arguments have.

Knows OpenAI's description of a function and JSON Schema's types; knows no model's way of calling.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import msgspec

from millrace.errors import RequestError
from millrace.text.tools.argument_shapes import Shapes, shapes_of
from millrace.text.tools.custom import INPUT
from millrace.text.tools.json_schema import TEXT, schema_limit_error

MAX_TOOLS = 128  # as OpenAI's API
_NAME = re.compile(r"[a-zA-Z0-9_.:/-]{1,128}")  # nothing that could end a tag or a JSON text


class Tool(msgspec.Struct, frozen=True, dict=True):
    """One function. given: as the prompt describes it. parameters: the schema of its arguments.

    strict: they must match it also where the model is free to call or not. lark: the grammar of a
    custom tool's input; None where the schema says all. custom: it takes one text, not arguments.
    """

    name: str
    parameters: dict[str, Any]
    given: dict[str, Any]
    strict: bool = False
    lark: str | None = None
    custom: bool = False

    @cached_property
    def shapes(self) -> Shapes:
        """The shapes of its arguments."""
        return shapes_of(self.parameters)

    def argument_types(self, key: str) -> frozenset[str]:
        """JSON types that an argument may have. One that the schema does not know is a text."""
        return frozenset().union(*(shape.types(key) for shape in self.shapes.all)) or TEXT

    def names_argument(self, key: str) -> bool:
        """Whether the schema names an argument so, or has a pattern that finds its name."""
        return any(shape.tells(key) for shape in self.shapes.all)

    @property
    def lists_arguments(self) -> bool:
        """Whether the schema lists its arguments, so that others are none."""
        return not any(shape.is_open for shape in self.shapes.all)


class ToolChoice(msgspec.Struct, frozen=True):
    """Which tools an answer may or must call. parallel: it may make several calls.

    tools: those that may be called. offered: those that the prompt tells of, which stays the same
    whichever of them must be called, so that it is found in the prefix cache.
    """

    mode: Literal["none", "auto", "required"]
    tools: tuple[Tool, ...]
    offered: tuple[Tool, ...]
    parallel: bool = True


def read_tools(given: Sequence[Mapping[str, Any]] | None) -> tuple[Tool, ...]:
    """The tools of a body. Raises RequestError that says which is wrong."""
    given = given or []
    if len(given) > MAX_TOOLS:
        message = f"tools has {len(given)} entries; at most {MAX_TOOLS} work"
        raise RequestError(message, param="tools")
    tools = tuple(
        (_custom if one.get("type") == "custom" else _tool)(one, f"tools[{at}]")
        for at, one in enumerate(given)
    )
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"tools has two functions called {name}", param="tools")
    return tools


def nested_tool(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function as chats describe it, also if it has the shape of /v1/responses or Anthropic's."""
    if "function" in given or given.get("type") not in (None, "function") or "name" not in given:
        return given
    parameters = given.get("parameters", given.get("input_schema"))
    function = {"name": given["name"], "parameters": parameters}
    function |= {key: given[key] for key in ("description", "strict") if given.get(key)}
    return {"type": "function", "function": function}


def _tool(given: Mapping[str, Any], where: str) -> Tool:
    given = nested_tool(given)
    function = given.get("function")
    if (given.get("type") or "function") != "function" or not isinstance(function, Mapping):
        raise RequestError(
            f'{where} must be {{"type": "function", "function": {{"name": ...}}}}', param="tools"
        )
    name = _name(function, f"{where}.function")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        message = f"{where}.function.parameters must be a JSON schema, an object"
        raise RequestError(message, param="tools")
    if problem := schema_limit_error(parameters):
        raise RequestError(f"{where}.function.parameters: {problem}", param="tools")
    schema = parameters or {"type": "object", "properties": {}}
    return Tool(name, schema, dict(given), function.get("strict") is True)


def _name(described: Mapping[str, Any], where: str) -> str:
    name = described.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        message = f"{where}.name must be 1 to 128 letters, digits or _ . : / -"
        raise RequestError(message, param="tools")
    return name


def _custom(given: Mapping[str, Any], where: str) -> Tool:
    """A custom tool, as a function that takes one text. Its format binds the text always."""
    custom = given.get("custom")
    if not isinstance(custom, Mapping):
        raise RequestError(
            f'{where} must be {{"type": "custom", "custom": {{"name": ...}}}}', param="tools"
        )
    name = _name(custom, f"{where}.custom")
    text, lark, told = _format(custom.get("format"), f"{where}.custom.format")
    schema = {"type": "object", "properties": {INPUT: text}, "required": [INPUT]}
    shown = {**schema, "properties": {INPUT: {"type": "string"}}}
    described = "\n\n".join(filter(None, (str(custom.get("description") or ""), told)))
    function = {"name": name, "description": described, "parameters": shown}
    strict = lark is not None or "pattern" in text
    given = {"type": "function", "function": function}
    return Tool(name, schema, given, strict, lark, custom=True)


def _format(form: Any, where: str) -> tuple[dict[str, Any], str | None, str]:
    """(schema of a custom tool's input, its grammar in Lark, what the model is told of it)."""
    if form is None or (isinstance(form, Mapping) and form.get("type") == "text"):
        return {"type": "string"}, None, ""
    if not isinstance(form, Mapping) or form.get("type") != "grammar":
        raise RequestError(f'{where} must be of type "text" or "grammar"', param="tools")
    grammar = form.get("grammar")
    syntax, definition = "", None
    if isinstance(grammar, Mapping):
        syntax, definition = str(grammar.get("syntax")), grammar.get("definition")
    if syntax not in ("lark", "regex") or not isinstance(definition, str):
        message = f"{where}.grammar needs a syntax, lark or regex, and a definition, a text"
        raise RequestError(message, param="tools")
    told = f"The input must match this {syntax} grammar:\n{definition}"
    if syntax == "lark":
        return {"type": "string"}, definition, told
    whole = definition.removeprefix("^")
    if not whole.endswith("\\$"):
        whole = whole.removesuffix("$")
    return {"type": "string", "pattern": f"^(?:{whole})$"}, None, told


_MODES = ("none", "auto", "required", "any")


def choose_tools(
    tools: tuple[Tool, ...], choice: str | Mapping[str, Any] | None, parallel: bool = True
) -> ToolChoice:
    """What `tool_choice` says of the tools, in the words of OpenAI's or Anthropic's API. Raises
    RequestError."""
    if isinstance(choice, Mapping) and choice.get("type") in _MODES:
        parallel = parallel and not choice.get("disable_parallel_tool_use")
        choice = str(choice["type"])
    if choice == "any":
        choice = "required"
    if choice is None:
        choice = "auto" if tools else "none"
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise _bad_choice(choice)
        if choice == "required" and not tools:
            raise RequestError("tool_choice required needs tools", param="tool_choice")
        mode: Literal["none", "auto", "required"] = choice if tools else "none"  # type: ignore[assignment]
        return ToolChoice(mode, tools, () if mode == "none" else tools, parallel)
    if not isinstance(choice, Mapping):
        raise _bad_choice(choice)
    if choice.get("type") == "allowed_tools":
        return _allowed(tools, choice.get("allowed_tools"), parallel)
    named = _named(tools, choice)
    return ToolChoice("required", (named,), tools, parallel=False)


def _allowed(tools: tuple[Tool, ...], given: Any, parallel: bool) -> ToolChoice:
    """{"type": "allowed_tools", "allowed_tools": {"mode", "tools"}}: some of the tools."""
    if not isinstance(given, Mapping) or not isinstance(given.get("tools"), list):
        raise _bad_choice(given)
    some = tuple(_named(tools, one) for one in given["tools"])
    return choose_tools(some, given.get("mode", "auto"), parallel)


def _named(tools: tuple[Tool, ...], choice: Any) -> Tool:
    name = None
    if isinstance(choice, Mapping):
        function = choice.get("custom" if choice.get("type") == "custom" else "function")
        name = (function if isinstance(function, Mapping) else choice).get("name")
    if not isinstance(name, str):
        raise _bad_choice(choice)
    for tool in tools:
        if tool.name == name:
            return tool
    known = ", ".join(tool.name for tool in tools) or "none is"
    raise RequestError(
        f"tool_choice names {name}, which is not among the tools; {known} given",
        param="tool_choice",
    )


def _bad_choice(choice: Any) -> RequestError:
    return RequestError(
        'tool_choice must be "none", "auto", "required" (Anthropic: {"type": "any"}) or '
        f'{{"type": "function", "function": {{"name": ...}}}}, got {str(choice)[:100]!r}',
        param="tool_choice",
    )
