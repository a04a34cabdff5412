"""What an output must match, as a grammar in llguidance's own format.

Schemas and expressions become grammars here and are checked, so that a client learns at once what
is wrong and where; `tool_grammar` does the same for calls of tools. Matching is the engine's
business. llguidance is imported with the first request that needs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from millrace.common.native_stack import CHECK_STACK, run_on_stack
from millrace.common.optional import available
from millrace.errors import RequestError
from millrace.protocol import StructuredOutputs
from millrace.text.gbnf import gbnf_to_lark, is_gbnf
from millrace.text.structural_tag import StructuralTagError, structural_tag_rules
from millrace.text.tools.json_schema import schema_limit_error
from millrace.text.tools.schema_dialects import (
    Strictness,
    closed_schema,
    read_schema,
    without_patterns,
)

MAX_GRAMMAR = 1 << 18  # characters; a larger one takes the matcher seconds
# The matcher's compiler recurses natively along rules and references: their number bounds its
# stack. A grammar within these limits may still be too deep; see `millrace.common.native_stack`.
MAX_RULES = 1000
MAX_CHECKS = 200  # parts of a wrong schema that are tried to find the fault

# For a start rule: models put line breaks between the end of their reasoning and what follows.
LEADING_NEWLINES = r"/\n{0,2}/ "

# Between the tokens of a JSON text: a line break and an indent. A model that is not sure what comes
# next would else fill its output with white space, which every JSON grammar allows without end.
_WHITE_SPACE = r"\n? {0,16}"


def output_grammar(
    wanted: StructuredOutputs, field: str, gap: bool, strictness: Strictness = "plain"
) -> str:
    """The grammar of `structured_outputs`. field: the client's name for it. gap: line breaks
    may precede it. strictness: of a schema. Raises RequestError that says what is wrong, and where.
    """
    rules = output_rules(wanted, field, strictness)
    source = f"start: {LEADING_NEWLINES if gap else ''}body\n{rules}"
    problem = grammar_error(source)
    if problem:
        raise _refusal(wanted, field, strictness, problem)
    return source


def output_rules(wanted: StructuredOutputs, field: str, strictness: Strictness = "plain") -> str:
    """The rule `body` in llguidance's Lark, and those that it needs."""
    body, rules = _body(wanted, field, strictness)
    return f"body: {body}\n{rules}"


def _body(wanted: StructuredOutputs, field: str, strictness: Strictness) -> tuple[str, str]:
    """(the right side of the rule, further rules)."""
    if wanted.json is not None:
        schema = _schema(wanted.json, field, strictness)
        if wanted.disable_additional_properties:
            schema = closed_schema(schema)
        space = _white_space(wanted)
        return f"%json {schema_json(schema, strictness == 'lenient', space)}", ""
    if wanted.json_object:
        return f"%json {schema_json({'type': 'object'}, space=_white_space(wanted))}", ""
    if wanted.regex is not None:
        return "PATTERN", f"PATTERN: {regex_terminal(wanted.regex)}\n"
    if wanted.choice is not None:
        if not all(wanted.choice):
            raise RequestError(f"{field}: a choice is empty", param=field)
        return " | ".join(literal(text) for text in wanted.choice), ""
    if wanted.structural_tag is not None:
        return _structural_tag(wanted.structural_tag, field)
    return client_grammar(wanted.grammar or "", f"{field}.grammar", field), ""


def client_grammar(grammar: str, place: str, field: str) -> str:
    """A grammar of a client, in Lark or EBNF, for the right side of a rule."""
    grammar = _as_lark(grammar, place, field)
    rules = len(_RULE.findall(grammar))
    if rules > MAX_RULES:
        raise RequestError(
            f"{place} has {rules} rules; at most {MAX_RULES} work",
            param=field,
            code="invalid_grammar",
        )
    return f"%lark {{\n{grammar}\n}}"


def _as_lark(grammar: str, place: str, field: str) -> str:
    if len(grammar) > MAX_GRAMMAR or not is_gbnf(grammar):
        return grammar
    try:
        return gbnf_to_lark(grammar)
    except ValueError as error:
        raise RequestError(
            f"{place}: {one_line(str(error))}", param=field, code="invalid_grammar"
        ) from None


def _structural_tag(given: dict[str, Any] | str, field: str) -> tuple[str, str]:
    try:
        return structural_tag_rules(
            given,
            json_rule=lambda schema: f"%json {schema_json(readable(schema, 'plain'))}",
            regex_rule=regex_terminal,
            grammar_rule=lambda grammar: client_grammar(grammar, f"{field}: a grammar", field),
        )
    except StructuralTagError as error:
        raise RequestError(
            f"{field}.structural_tag: {error}", param=field, code="invalid_grammar"
        ) from None
    except RecursionError:
        raise RequestError(
            f"{field}.structural_tag is nested too deeply", param=field, code="invalid_grammar"
        ) from None


def _white_space(wanted: StructuredOutputs) -> str:
    """What may stand between the tokens of a JSON text, as an expression."""
    if wanted.disable_any_whitespace:
        return ""
    return _WHITE_SPACE if wanted.whitespace_pattern is None else wanted.whitespace_pattern


def schema_json(schema: Any, lenient: bool = False, space: str = _WHITE_SPACE) -> str:
    """A schema for the matcher, with white space as it is bound here. lenient: keywords that the
    matcher does not know bind nothing; else they are refused. space: as an expression.
    """
    return json.dumps(with_options(schema, lenient, space))


def with_options(schema: Any, lenient: bool, space: str = _WHITE_SPACE) -> Any:
    """A schema with what the matcher is to make of it."""
    if not isinstance(schema, dict):
        return schema
    options: dict[str, Any] = {"lenient": lenient, "coerce_one_of": lenient}
    if space:
        options["whitespace_pattern"] = space
    else:
        options["whitespace_flexible"] = False
        options["item_separator"], options["key_separator"] = ",", ":"
    return {"x-guidance": options, **schema}


def readable(schema: Any, strictness: Strictness) -> Any:
    """A schema as the matcher reads it; lenient: without patterns that it cannot read."""
    schema = read_schema(schema, strictness)
    if strictness == "lenient" and schema_error(with_options(schema, True)):
        return without_patterns(schema, _compiles)
    return schema


def _compiles(pattern: str) -> bool:
    return not schema_error({"type": "string", "pattern": pattern})


def _schema(given: dict[str, Any] | str, field: str, strictness: Strictness) -> Any:
    schema: Any = given
    if isinstance(given, str):
        try:
            schema = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"{field}: the schema is not valid JSON: {error}", param=field
            ) from None
    if problem := schema_limit_error(schema):
        raise RequestError(f"{field}: {problem}", param=field, code="invalid_grammar")
    return readable(schema, strictness)


def _refusal(
    wanted: StructuredOutputs, field: str, strictness: Strictness, problem: str
) -> RequestError:
    where, text = field, one_line(problem)
    if wanted.json is not None:
        schema = with_options(_schema(wanted.json, field, strictness), strictness == "lenient")
        own = schema_error(schema) or problem
        where, text = f"{field}, schema{error_path(schema, own)}", one_line(own)
    elif wanted.regex is not None:
        where, text = f"{field}.regex", _regex_problem(wanted.regex)
    elif wanted.grammar is not None:
        lark = _as_lark(wanted.grammar, f"{field}.grammar", field)
        where, text = f"{field}.grammar", one_line(grammar_error(lark) or problem)
    elif wanted.structural_tag is not None:
        where = f"{field}.structural_tag"
    return RequestError(f"{where}: {text}", param=field, code="invalid_grammar")


# --- checking -----------------------------------------------------------------------------------


def grammar_error(source: str) -> str:
    """What is wrong with a grammar; empty if nothing is."""
    if len(source) > MAX_GRAMMAR:
        return f"the grammar has {len(source)} characters; at most {MAX_GRAMMAR} work"
    error, _ = _checked(source)
    return error


def grammar_notes(source: str) -> tuple[str, ...]:
    """What of the schemas of a grammar without faults binds nothing, a line each."""
    return tuple(one_line(note) for note in _checked(source)[1])


_RULE = re.compile(r"^[ \t]*[?!]?[A-Za-z_]\w*[^\n:\"/]*:", re.MULTILINE)


@lru_cache(maxsize=64)
def _checked(source: str) -> tuple[str, tuple[str, ...]]:
    """(what is wrong, what binds nothing)."""
    if not available("llguidance"):
        raise RequestError(
            "structured outputs need llguidance, which the server cannot import; see its log"
        )
    from llguidance import LLMatcher

    failed, messages = run_on_stack(
        CHECK_STACK, lambda: LLMatcher.validate_grammar_with_warnings(source)
    )
    return ("\n".join(messages), ()) if failed else ("", tuple(messages))


def schema_error(schema: Any) -> str:
    """As `_problem`, of a schema alone, where the message names no place in a grammar around it."""
    source = json.dumps({"grammars": [{"json_schema": schema}]})
    return grammar_error(source)


def error_path(schema: Any, problem: str) -> str:
    """The path to the smallest part of a schema that is at fault, such as `.properties.age`.

    problem: what `schema_error` says of the whole.
    """
    root = schema if isinstance(schema, Mapping) else {}
    shared = {key: root[key] for key in ("x-guidance", *SHARED) if key in root}
    path, checks = "", 0
    while isinstance(schema, Mapping):
        for step, part in _parts(schema):
            checks += 1
            if checks > MAX_CHECKS:
                return path
            if isinstance(part, Mapping) and schema_error({**shared, **part}) == problem:
                path, schema = path + step, part
                if step.startswith(_SHARED_STEPS):
                    shared = {}  # the fault is in here; it would be found again in every part
                break
        else:
            return path
    return path


SHARED = ("$defs", "definitions")
_SHARED_STEPS = (".$defs.", ".definitions.")


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(step, schema) of every schema that stands directly in this one."""
    for key in (*SHARED, "properties", "patternProperties"):
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
    lines = grammar_error(f"start: {regex_terminal(regex)}").splitlines()
    errors = [line[len("error: ") :] for line in lines if line.startswith("error: ")]
    pointers = [line.index("^") for line in lines if line.strip() and not line.strip(" ^")]
    if not errors:
        return one_line(" ".join(lines))
    place = f", at character {pointers[0] - 3}" if pointers and "\n" not in regex else ""
    return f"{errors[0]}{place}"


def regex_terminal(regex: str) -> str:
    """An expression between slashes; those inside are escaped unless they are already."""
    escaped = re.sub(
        r"\\.|/", lambda found: "\\/" if found[0] == "/" else found[0], regex, flags=re.S
    )
    return "/" + escaped.replace("\n", "\\n") + "/"


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def one_line(text: str) -> str:
    """What a message comes down to, with a place such as `1(5)` spelled out."""
    lines = [line for line in text.splitlines() if line.strip()]
    lines = [line[len("error: ") :] for line in lines if line.startswith("error: ")] or lines
    line = lines[0] if lines else text
    place = re.match(r"(?:at )?(\d+)\((\d+)\): ", line)
    if place:
        line = f"line {place[1]}, column {place[2]}: {line[place.end() :]}"
    return line[:300]
