"""Calls of tools as a grammar: what a model may write where it must call a tool, or may call one.

A forced answer consists of calls only. A free one consists of text and calls, and only the calls
follow the grammar; it is used where a tool is `strict` or where the text has a grammar of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import msgspec

from millrace.errors import RequestError
from millrace.text.argument_grammar import ArgumentGrammar
from millrace.text.grammar import (
    LEADING_NEWLINES,
    client_grammar,
    error_path,
    grammar_error,
    literal,
    one_line,
    readable,
    schema_error,
    schema_json,
    with_options,
)
from millrace.text.text_terminals import Terminals, UnboundError
from millrace.text.tools.call_tags import (
    CALL,
    CALL_END,
    FUNCTION,
    FUNCTION_END,
    PARAMETER,
    PARAMETER_END,
)
from millrace.text.tools.custom import INPUT
from millrace.text.tools.json_schema import types_of
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
    tools = tuple(_readable(tool) for tool in choice.tools)
    choice = msgspec.structs.replace(choice, tools=tools)
    start = f"start: {_start(choice, gap, body is not None)}\n"
    source = start + (body or "") + _rules(choice, as_json, token_id)
    problem = grammar_error(source)
    if problem:
        raise _refusal(choice.tools, problem)
    return source


def _readable(tool: Tool) -> Tool:
    schema = readable(tool.parameters, "strict" if tool.strict else "lenient")
    return msgspec.structs.replace(tool, parameters=schema)


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
    calls = " | ".join(f"call_{at}" for at in range(len(choice.tools)))
    opening, closing = _marker(CALL, token_id), _marker(CALL_END, token_id)
    forced = choice.mode == "required"
    terminals = Terminals()
    each = [
        _call(at, tool, as_json, forced or tool.strict, terminals)
        for at, tool in enumerate(choice.tools)
    ]
    call = rf'call: {opening} "\n" ({calls}) "\n" {closing}'
    return "\n".join(["WORDS: /(?s:.*)/", call, *each, terminals.source()])


def _marker(text: str, token_id: TokenId) -> str:
    known = token_id(text)
    return literal(text) if known is None else f"<[{known}]>"


def _json_call(at: int, tool: Tool, binds: bool) -> str:
    """binds: the arguments must match the schema; else they are any object."""
    head = literal(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
    schema = {**tool.parameters, "type": "object"} if binds else {"type": "object"}
    return f'call_{at}: {head} %json {schema_json(schema, not tool.strict)} "}}"' + "\n"


def _xml_call(at: int, tool: Tool, binds: bool, terminals: Terminals) -> str:
    """binds: as in `_json_call`."""
    if binds:
        return ArgumentGrammar(tool, f"call_{at}", tool.strict, terminals).source()
    head, ending = literal(f"{FUNCTION}{tool.name}>\n"), literal(FUNCTION_END)
    name = f"any_{at}"
    key = rf'{literal(PARAMETER)} /[^<>\n]+/ ">\n" {name}_value "\n"'
    value = f"{name}_value[suffix={literal(PARAMETER_END)}]: /(?s:.*)/"
    return f"call_{at}: {head} {name}* {ending}\n{name}: {key}\n{value}\n"


def _lark_call(at: int, tool: Tool, as_json: bool, lark: str) -> str:
    """A call of a custom tool whose input has a grammar of its own. Raises RequestError."""
    where = f"tools[{at}].custom.format.grammar"
    if as_json:
        raise RequestError(
            f"{where}: this model writes calls as JSON, in which only a regex can be bound; give "
            "one, or leave the format out",
            param="tools",
            code="invalid_grammar",
        )
    rule = client_grammar(lark, where, "tools")
    head = literal(f"{FUNCTION}{tool.name}>\n{PARAMETER}{INPUT}>\n")
    ending = literal(f"\n{PARAMETER_END}\n{FUNCTION_END}")
    return f"call_{at}: {head} input_{at} {ending}\ninput_{at}: {rule}\n"


def _call(at: int, tool: Tool, as_json: bool, binds: bool, terminals: Terminals) -> str:
    """The rule of one function's calls. Raises RequestError for what its schema cannot bind."""
    if tool.lark is not None:
        return _lark_call(at, tool, as_json, tool.lark)
    if binds and "object" not in types_of(tool.parameters, tool.parameters):
        raise _wrong(at, "", "the arguments of a function are an object")
    schema = with_options(tool.parameters, not tool.strict)
    if binds and (problem := schema_error(schema)):
        raise _wrong(at, error_path(schema, problem), one_line(problem))
    if as_json:
        return _json_call(at, tool, binds)
    try:
        return _xml_call(at, tool, binds, terminals)
    except UnboundError as error:
        raise _wrong(at, "", str(error)) from None


def _wrong(at: int, path: str, problem: str) -> RequestError:
    return RequestError(
        f"tools[{at}].function.parameters{path}: {problem}", param="tools", code="invalid_grammar"
    )


def _refusal(tools: Sequence[Tool], problem: str) -> RequestError:
    for at, tool in enumerate(tools):
        if tool.lark is not None and (own := grammar_error(tool.lark)):
            message = f"tools[{at}].custom.format.grammar: {one_line(own)}"
            return RequestError(message, param="tools", code="invalid_grammar")
        own = schema_error(tool.parameters)
        if own:
            return _wrong(at, error_path(tool.parameters, own), one_line(own))
    return RequestError(f"tools: {one_line(problem)}", param="tools", code="invalid_grammar")
