"""A parameter's bare text as JSON.

Qwen's format writes texts bare and everything else as JSON, so that the schema's types decide what
a value is. Where a text would be read as something else, or would end early, it stands in quotes:
a JSON text whose content `needs_quotes` is read as that content. The grammar of forced calls
(`argument_grammar`) writes by the same rules, so they are told here once.
"""

from __future__ import annotations

import contextlib
import json
import re

from millrace.text.tools.call_tags import TAGS, text_literal
from millrace.text.tools.json_repair import NUMBER, dump, repaired, word
from millrace.text.tools.json_schema import SCALARS, TEXT, type_of

# What a bare text must not be where values of that type are allowed, as expressions in the syntax
# that Python and the matcher share.
AMBIGUOUS = {
    "null": "[nN][uU][lL][lL]|[nN][oO][nN][eE]",
    "boolean": "[tT][rR][uU][eE]|[fF][aA][lL][sS][eE]",
    "integer": NUMBER.pattern,
    "number": NUMBER.pattern,
    "object": r"\{[\s\S]*",
    "array": r"\[[\s\S]*",
}


def needs_quotes(text: str, types: frozenset[str]) -> bool:
    """Whether a text cannot stand bare as a value of a parameter with these types."""
    if any(tag in text for tag in TAGS):
        return True
    core = text.strip('"\\')
    return any(re.fullmatch(AMBIGUOUS[kind], core) for kind in types & AMBIGUOUS.keys())


def read_text(text: str, types: frozenset[str]) -> str:
    """A bare text as it is meant: without the quotes that it needs."""
    if text.startswith('"') and text_literal(text) == len(text):
        try:
            content = json.loads(text)
        except ValueError:
            return text
        if needs_quotes(content, types):
            return str(content)
    return text


def read_value(text: str, types: frozenset[str]) -> str:
    """The JSON of a parameter's bare text. types: those that its schema allows. What is of none of
    them becomes a text.
    """
    if types <= TEXT:
        return dump(read_text(text, types))
    made = _mixed(text, types) if "string" in types else _typed(text.strip(), types)
    return dump(read_text(text, types)) if made is None else made


def _mixed(text: str, types: frozenset[str]) -> str | None:
    """The text as one of its other types; None if it is none of them as it stands."""
    if text[:1] in "{[":
        if not types & {"object" if text[:1] == "{" else "array"}:
            return None
        found = repaired(text)
        return found[0] if found and not found[1] and not text[-1:].isspace() else None
    known = word(text)
    return known if known is not None and types & _types(known) else None


def _typed(text: str, types: frozenset[str]) -> str | None:
    """The text as JSON, Python's spelling included; None if it is neither."""
    found = repaired(text)
    if found is not None:
        return found[0]
    known = word(text)
    if known is not None:
        too_large = NUMBER.fullmatch(text) and known != text and "number" not in types
        return None if too_large else known
    if (number := _number(text, types)) is not None:
        return number
    try:
        inner = json.loads(text) if text[:1] == '"' else None
    except ValueError:
        return None
    if isinstance(inner, str) and not inner.startswith('"'):  # JSON within JSON
        return _typed(inner.strip(), types) or dump(inner)
    return None


def _number(text: str, types: frozenset[str]) -> str | None:
    """The JSON of a number that only Python writes so, such as `+3`, `.5` or `1_000`."""
    if len(text) > 400 or not re.fullmatch(r"[+-]?[0-9_.]+([eE][+-]?[0-9]+)?", text):
        return None
    for kind, reads in (("integer", int), ("number", float)):
        if kind in types:
            with contextlib.suppress(ValueError):
                return word(str(reads(text)))
    return None


def _types(scalar: str) -> set[str]:
    """The types of a scalar's JSON."""
    kind = type_of(json.loads(scalar))
    return {kind, "number"} & SCALARS if kind == "integer" else {kind}
