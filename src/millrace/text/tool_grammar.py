"""Calls of tools as a grammar: what a model may write where it must call a tool, or may call one.

A forced answer consists of calls only. A free one consists of text and calls, and only the calls
follow the grammar; it is used where a tool is `strict` or where the text has a grammar of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from millrace.errors import RequestError
from millrace.text.grammar import (
    LEADING_NEWLINES,
    SHARED,
    error_path,
    grammar_error,
    literal,
    one_line,
    schema_error,
    schema_json,
)
from millrace.text.tools.call_tags import CALL, CALL_END, FUNCTION_END, PARAMETER, PARAMETER_END
from millrace.text.tools.schema import Tool, ToolChoice

TokenId = Callable[[str], int | None]


def tool_call_grammar(
    choice: ToolChoice, as_json: bool, gap: bool, token_id: TokenId, body: str | None = None
) -> str:
    """The grammar of an answer that may or must call tools. Raises RequestError.

    as_json: which of the two formats of `text.tools.parser`. gap: line breaks may
    precede it. token_id: of a marker that is one token; the matcher knows such a token only by its
    id. body: the rule of the same name, which an answer without calls must match.
    """
    start = f"start: {_start(choice, gap, body is not None)}\n"
    source = start + (body or "") + _rules(choice, as_json, token_id)
    problem = grammar_error(source)
    if problem:
        raise _refusal(choice.tools, problem)
    return source


def can_constrain_auto_calls(token_id: TokenId) -> bool:
    """Whether text and calls can be told apart: everything but the call's token is text."""
    return token_id(CALL) is not None


def _start(choice: ToolChoice, gap: bool, has_body: bool) -> str:
    calls = r'call ("\n" call)*' if choice.parallel else "call"
    before = LEADING_NEWLINES if gap else ""
    if choice.mode == "required":
        return before + calls
    if has_body:
        return f"{before}({calls} | body)"
    return "WORDS (call WORDS)*" if choice.parallel else "WORDS call?"


def _rules(choice: ToolChoice, as_json: bool, token_id: TokenId) -> str:
    write = _json_call if as_json else _xml_call
    calls = " | ".join(f"call_{at}" for at in range(len(choice.tools)))
    opening, closing = _marker(CALL, token_id), _marker(CALL_END, token_id)
    forced = choice.mode == "required"
    each = [write(at, tool, forced or tool.strict) for at, tool in enumerate(choice.tools)]
    call = rf'call: {opening} "\n" ({calls}) "\n" {closing}'
    return "\n".join(["WORDS: /(?s:.*)/", call, *each])


def _marker(text: str, token_id: TokenId) -> str:
    known = token_id(text)
    return literal(text) if known is None else f"<[{known}]>"


def _json_call(at: int, tool: Tool, binds: bool) -> str:
    """binds: the arguments must match the schema; else they are any object."""
    head = literal(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
    schema = (
        schema_json(tool.parameters, not tool.strict) if binds else schema_json({"type": "object"})
    )
    return f'call_{at}: {head} %json {schema} "}}"' + "\n"


def _xml_call(at: int, tool: Tool, binds: bool) -> str:
    """Parameters in the schema's order, those that are not required left out or not."""
    head, ending = literal(f"<function={tool.name}>\n"), literal(FUNCTION_END)
    if not binds:
        name = f"any_{at}"
        key = rf'{literal(PARAMETER)} /[^>\n]+/ ">\n" {name}_value "\n"'
        value = f"{name}_value[suffix={literal(PARAMETER_END)}]: /(?s:.*)/"
        return f"call_{at}: {head} {name}* {ending}\n{name}: {key}\n{value}\n"
    properties = tool.parameters.get("properties")
    required = tool.parameters.get("required")
    properties = properties if isinstance(properties, dict) else {}
    required = required if isinstance(required, list) else []
    parts, rules = [], ""
    for number, (key, schema) in enumerate(properties.items()):
        name = f"argument_{at}_{number}"
        parts.append(name if key in required else f"{name}?")
        rules += _argument(name, key, schema, tool)
    return f"call_{at}: {' '.join([head, *parts, ending])}\n{rules}"


def _argument(name: str, key: str, schema: Any, tool: Tool) -> str:
    head, tail = literal(f"{PARAMETER}{key}>\n"), f"\n{PARAMETER_END}\n"
    texts = _texts(schema)
    if texts is not None:
        choices = " | ".join(literal(text + tail) for text in texts)
        return f"{name}: {head} ({choices})\n"
    if tool.argument_types(key) <= {"string"}:
        value = f"{name}_value"
        ending = literal(PARAMETER_END)  # the first one ends it, as the parser sees it
        return f'{name}: {head} {value} "\\n"\n{value}[suffix={ending}]: /(?s:.*)/\n'
    definitions = {k: tool.parameters[k] for k in SHARED if k in tool.parameters}
    whole = {**schema, **definitions} if isinstance(schema, dict) else schema
    return f"{name}: {head} %json {schema_json(whole, not tool.strict)} {literal(tail)}\n"


def _texts(schema: Any) -> list[str] | None:
    """The texts that a schema of nothing else lists."""
    values = schema.get("enum") if isinstance(schema, dict) else None
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        return values
    return None


def _refusal(tools: Sequence[Tool], problem: str) -> RequestError:
    for at, tool in enumerate(tools):
        own = schema_error(tool.parameters)
        if own:
            where = f"tools[{at}].function.parameters{error_path(tool.parameters, own)}"
            return RequestError(f"{where}: {one_line(own)}", param="tools", code="invalid_grammar")
    return RequestError(f"tools: {one_line(problem)}", param="tools", code="invalid_grammar")
