"""What an output must match, as a grammar that the engine's matcher reads (llguidance's own).

Here schemas, expressions and tools become grammars and are checked, so that a client learns at
once what is wrong and where. Matching itself is the engine's business. llguidance is imported with
the first request that needs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from millrace.errors import RequestError
from millrace.protocol import StructuredOutputs
from millrace.text.tools import CALL, CALL_END, FUNCTION_END, PARAMETER_END
from millrace.text.toolset import Tool, ToolChoice

MAX_GRAMMAR = 1 << 18  # characters; a larger one takes the matcher seconds

# Models put line breaks between the end of their reasoning and what the grammar is about.
_GAP = r"/\n{0,2}/ "

# Between the tokens of a JSON text: a line break and an indent. A model that is not sure what comes
# next would else fill its output with white space, which every JSON grammar allows without end.
_WHITE_SPACE = r"\n? {0,16}"


def structured_source(wanted: StructuredOutputs, field: str, gap: bool) -> str:
    """The grammar of `structured_outputs`. field: what the client calls it. gap: line breaks may
    come first. Raises RequestError that says what is wrong, and where.
    """
    body, rules = _body(wanted, field)
    source = f"start: {_GAP if gap else ''}body\nbody: {body}\n{rules}"
    problem = _problem(source)
    if problem:
        raise _refusal(wanted, field, problem)
    return source


def _body(wanted: StructuredOutputs, field: str) -> tuple[str, str]:
    """(the right side of the main rule, further rules), in llguidance's Lark."""
    if wanted.json is not None:
        return f"%json {_compiled(_schema(wanted.json, field))}", ""
    if wanted.json_object:
        return f"%json {_compiled({'type': 'object'})}", ""
    if wanted.regex is not None:
        return "PATTERN", f"PATTERN: {_slashed(wanted.regex)}\n"
    if wanted.choice is not None:
        if not all(wanted.choice):
            raise RequestError(f"{field}: a choice is empty", param=field)
        return " | ".join(_literal(text) for text in wanted.choice), ""
    return f"%lark {{\n{wanted.grammar}\n}}", ""


def _compiled(schema: Any) -> str:
    """A schema for the matcher, with white space as it is bound here."""
    if isinstance(schema, dict):
        schema = {"x-guidance": {"whitespace_pattern": _WHITE_SPACE}, **schema}
    return json.dumps(schema)


def _schema(given: dict[str, Any] | str, field: str) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{field}: the schema is not valid JSON: {error}", param=field) from None


def _refusal(wanted: StructuredOutputs, field: str, problem: str) -> RequestError:
    where, text = field, _one_line(problem)
    if wanted.json is not None:
        schema = _schema(wanted.json, field)
        own = _schema_problem(schema) or problem
        where, text = f"{field}, schema{_where(schema, own)}", _one_line(own)
    elif wanted.regex is not None:
        where, text = f"{field}.regex", _regex_problem(wanted.regex)
    elif wanted.grammar is not None:
        where, text = f"{field}.grammar", _one_line(_problem(wanted.grammar) or problem)
    return RequestError(f"{where}: {text}", param=field, code="invalid_grammar")


# --- tool calls ---------------------------------------------------------------------------------


def tools_source(
    choice: ToolChoice, as_json: bool, gap: bool, token_id: Callable[[str], int | None]
) -> str:
    """The grammar of at least one call. as_json: in which of the two ways of `text.tools`.

    token_id: of a marker that is one token; the matcher knows such a token only by its id.
    """
    write = _json_call if as_json else _xml_call
    calls = " | ".join(f"call_{at}" for at in range(len(choice.tools)))
    more = r' ("\n" call)*' if choice.parallel else ""
    opening, closing = _marker(CALL, token_id), _marker(CALL_END, token_id)
    source = (
        f"start: {_GAP if gap else ''}call{more}\n"
        rf'call: {opening} "\n" ({calls}) "\n" {closing}'
        "\n" + "".join(write(at, tool) for at, tool in enumerate(choice.tools))
    )
    problem = _problem(source)
    if problem:
        raise _tools_refusal(choice.tools, problem)
    return source


def _marker(text: str, token_id: Callable[[str], int | None]) -> str:
    known = token_id(text)
    return _literal(text) if known is None else f"<[{known}]>"


def _json_call(at: int, tool: Tool) -> str:
    head = _literal(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
    return f'call_{at}: {head} %json {_compiled(tool.parameters)} "}}"' + "\n"


def _xml_call(at: int, tool: Tool) -> str:
    """Parameters in the schema's order, those that are not required left out or not."""
    properties = tool.parameters.get("properties")
    required = tool.parameters.get("required")
    properties = properties if isinstance(properties, dict) else {}
    required = required if isinstance(required, list) else []
    parts, rules = [_literal(f"<function={tool.name}>\n")], ""
    for number, (key, schema) in enumerate(properties.items()):
        name = f"argument_{at}_{number}"
        parts.append(name if key in required else f"{name}?")
        rules += _argument(name, key, schema, tool)
    parts.append(_literal(FUNCTION_END))
    return f"call_{at}: {' '.join(parts)}\n{rules}"


def _argument(name: str, key: str, schema: Any, tool: Tool) -> str:
    head, tail = _literal(f"<parameter={key}>\n"), f"\n{PARAMETER_END}\n"
    texts = _texts(schema)
    if texts is not None:
        choices = " | ".join(_literal(text + tail) for text in texts)
        return f"{name}: {head} ({choices})\n"
    if tool.property_types(key) <= {"string"}:
        value = f"{name}_value"
        ending = _literal(PARAMETER_END)  # the first one ends it, as the parser sees it
        return f'{name}: {head} {value} "\\n"\n{value}[suffix={ending}]: /(?s:.*)/\n'
    definitions = {k: tool.parameters[k] for k in _SHARED if k in tool.parameters}
    whole = {**schema, **definitions} if isinstance(schema, dict) else schema
    return f"{name}: {head} %json {_compiled(whole)} {_literal(tail)}\n"


def _texts(schema: Any) -> list[str] | None:
    """The texts that a schema of nothing else lists."""
    values = schema.get("enum") if isinstance(schema, dict) else None
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        return values
    return None


def _tools_refusal(tools: Sequence[Tool], problem: str) -> RequestError:
    for at, tool in enumerate(tools):
        own = _schema_problem(tool.parameters)
        if own:
            path = _where(tool.parameters, own)
            where = f"tools[{at}].function.parameters{path}"
            return RequestError(f"{where}: {_one_line(own)}", param="tools", code="invalid_grammar")
    return RequestError(f"tools: {_one_line(problem)}", param="tools", code="invalid_grammar")


# --- checking -----------------------------------------------------------------------------------


def _problem(source: str) -> str:
    """What is wrong with a grammar; empty if nothing is."""
    if len(source) > MAX_GRAMMAR:
        return f"the grammar has {len(source)} characters; at most {MAX_GRAMMAR} work"
    return _checked(source)


@lru_cache(maxsize=64)
def _checked(source: str) -> str:
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise RequestError(
            "structured output needs the package llguidance, which is not installed here"
        ) from None
    return str(LLMatcher.validate_grammar(source))


def _schema_problem(schema: Any) -> str:
    """As `_problem`, of a schema alone, where the message names no place in a grammar around it."""
    source = json.dumps({"grammars": [{"json_schema": schema}]})
    return _problem(source)


def _where(schema: Any, problem: str) -> str:
    """The path to the smallest part of a schema that is at fault, such as `.properties.age`.

    problem: what `_schema_problem` says of the whole.
    """
    root = schema if isinstance(schema, Mapping) else {}
    shared = {key: root[key] for key in _SHARED if key in root}
    path = ""
    while isinstance(schema, Mapping) and len(path) < 1000:
        for step, part in _parts(schema):
            if isinstance(part, Mapping) and _schema_problem({**shared, **part}) == problem:
                path, schema = path + step, part
                if step.startswith(_SHARED_STEPS):
                    shared = {}  # the fault is in here; it would be found again in every part
                break
        else:
            return path
    return path


_SHARED = ("$defs", "definitions")
_SHARED_STEPS = (".$defs.", ".definitions.")


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(step, schema) of every schema that stands directly in this one."""
    for key in (*_SHARED, "properties", "patternProperties"):
        named = schema.get(key)
        for name, part in named.items() if isinstance(named, Mapping) else ():
            yield f".{key}.{name}", part
    for key in ("items", "additionalProperties", "not"):
        yield f".{key}", schema.get(key)
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        listed = schema.get(key)
        for at, part in enumerate(listed if isinstance(listed, list) else ()):
            yield f".{key}[{at}]", part


def _regex_problem(regex: str) -> str:
    """What is wrong, and at which character, from the matcher's message with its pointer."""
    lines = _problem(f"start: {_slashed(regex)}").splitlines()
    errors = [line[len("error: ") :] for line in lines if line.startswith("error: ")]
    pointers = [line.index("^") for line in lines if line.strip() and not line.strip(" ^")]
    if not errors:
        return _one_line(" ".join(lines))
    place = f", at character {pointers[0] - 3}" if pointers and "\n" not in regex else ""
    return f"{errors[0]}{place}"


def _slashed(regex: str) -> str:
    """The expression between slashes; those inside are escaped unless they are already."""
    escaped = re.sub(
        r"\\.|/", lambda found: "\\/" if found[0] == "/" else found[0], regex, flags=re.S
    )
    return "/" + escaped.replace("\n", "\\n") + "/"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    """What a message comes down to, with a place such as `1(5)` spelled out."""
    lines = [line for line in text.splitlines() if line.strip()]
    lines = [line[len("error: ") :] for line in lines if line.startswith("error: ")] or lines
    line = lines[0] if lines else text
    place = re.match(r"(?:at )?(\d+)\((\d+)\): ", line)
    if place:
        line = f"line {place[1]}, column {place[2]}: {line[place.end() :]}"
    return line[:300]
