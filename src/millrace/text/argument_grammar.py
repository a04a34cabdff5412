"""The arguments of one function as a grammar of Qwen's format: what its schema allows, no more.

What `parser` and `values` read from a text that the grammar accepts matches the schema,
and each value that matches has such a text. A parameter's value is one terminal with the closing
tag behind it wherever it can be, since the matcher's lexer takes the longest terminal and never
goes back; objects, arrays and bounded numbers are the matcher's own JSON.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

from millrace.text.grammar import literal, regex_terminal, schema_json
from millrace.text.tools.argument_shapes import Shape
from millrace.text.tools.call_tags import (
    FUNCTION,
    FUNCTION_END,
    MAX_NAME,
    PARAMETER,
    PARAMETER_END,
    TAGS,
    name_at,
)
from millrace.text.tools.json_repair import MAX_DIGITS, NUMBER, dump
from millrace.text.tools.json_schema import (
    allows,
    bundled,
    listed,
    resolve,
    types_of,
    values_of,
)
from millrace.text.tools.schema import Tool
from millrace.text.tools.text_patterns import FORMATS, lengths, searched, whole_numbers
from millrace.text.tools.values import AMBIGUOUS, needs_quotes

_ANNOTATIONS = {"title", "description", "default", "examples", "$defs", "definitions"}
MAX_BOUND = 10**20  # of a whole number; those of greater ones are the matcher's
MAX_PATTERNS = 3  # of property names; each set of them is a rule
_MAX_DEPTH = 16

_ANY = "/(?s:.*)/"
_TAG = "|".join(TAGS).replace("/", r"\/")
_TAGGED = f"/(?s:.*)(?:{_TAG})(?s:.*)/"
# A character in JSON's quotes; of the ways to write one those that keep a tag as it is.
_UNIT = r'(?:[^"\\\x00-\x1f]|\\["\\\/bfnrt]|\\u00[01][0-9a-f])'
_WHOLE = f"-?(?:0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})"
_UNESCAPED = r'/[^"\\\x00-\x1f]*/'
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_NUMBER_WORDS = (*sorted(_BOUNDS), "multipleOf")
_NAME_END = ">\n"
_TAIL = f"\n{PARAMETER_END}\n"


class UnboundError(Exception):
    """A part of a schema that no grammar binds here. The message says which and why."""


class _Texts(NamedTuple):
    """Texts that a schema allows, as a terminal. quoted: the same as they stand between JSON's
    quotes; None if only those are known that stand there as they are. bounds: (least, most)
    characters, where nothing else is bound.
    """

    terminal: str
    quoted: str | None
    bounds: tuple[int, int | None] | None = None

    @property
    def in_quotes(self) -> str:
        return self.quoted or f"({self.terminal} & {_UNESCAPED})"


class Terminals:
    """The terminals of a grammar, each told once: most parameters have the same ones."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def name(self, body: str) -> str:
        """The name of a terminal with that right side."""
        return self._names.setdefault(body, f"TERMINAL_{len(self._names)}")

    def source(self) -> str:
        return "".join(f"{name}: {body}\n" for body, name in self._names.items())


class ArgumentGrammar:
    """Writes the rule `name`: a call of the tool in Qwen's format, without the outer tags.

    exact: raise UnboundError for what cannot be bound; else that binds nothing.
    """

    def __init__(self, tool: Tool, name: str, exact: bool, terminals: Terminals) -> None:
        self._terminal = terminals.name
        self._tool = tool
        self._root = tool.parameters
        self._name = name
        self._exact = exact
        self._rules: list[str] = []

    def source(self) -> str:
        """The rule and those that it needs, one a line. Raises UnboundError."""
        shapes, problem = self._tool.shapes
        if problem:
            raise UnboundError(problem)
        bodies = [self._shape(shape) for shape in shapes]
        options = [body for body in bodies if body is not None]
        if not options:
            raise UnboundError("no arguments match it")
        head = literal(f"{FUNCTION}{self._tool.name}>\n")
        ending = literal(FUNCTION_END)
        rule = f"{self._name}: {head} ({' | '.join(options)}) {ending}"
        return "\n".join([rule, *self._rules]) + "\n"

    # --- names ------------------------------------------------------------------------------------

    def _shape(self, shape: Shape) -> str | None:
        """Parameters in the schema's order, optional ones left out or not, then those of a map.
        None if no arguments match.
        """
        parts, written = [], []
        for name in shape.names:
            value = self._value(shape.schema(name), self._tool.argument_types(name))
            if value is None or not _is_writable(name):
                if name in shape.required:
                    self._refuse_if(value is not None, f"no parameter can be called {name!r}")
                    return None
                continue
            written.append(name)
            rule = self._rule(f"{literal(f'{PARAMETER}{name}{_NAME_END}')} {value}")
            parts.append(rule if name in shape.required else f"{rule}?")
        entries = self._entries(shape)
        parts.append(self._map(shape, len(shape.required), len(parts), entries))
        return " ".join(part for part in parts if part) or '""'

    def _refuse_if(self, unbound: bool, problem: str) -> None:
        if unbound and self._exact:
            raise UnboundError(problem)

    def _map(self, shape: Shape, required: int, names: int, entries: list[str]) -> str:
        """The parameters of other names, as many as may be."""
        least, most = shape.least, shape.most
        bound = least > required or (most is not None and (bool(entries) or most < names))
        self._refuse_if(
            bound and names > 0, "minProperties and maxProperties beside properties cannot be bound"
        )
        if not entries:
            return ""
        rule = self._rule(" | ".join(entries))
        if names or not bound:
            return f"{rule}*"
        return f"{rule}{{{least},{'' if most is None else most}}}"

    def _entries(self, shape: Shape) -> list[str]:
        """The parameters of other names: one rule for each set of patterns that may find them."""
        patterns = shape.patterns
        if len(patterns) > MAX_PATTERNS:
            self._refuse_if(True, f"more than {MAX_PATTERNS} patternProperties cannot be bound")
            return []
        terminals = {one: self._pattern(one) for one in patterns}
        sets = [
            some for count in range(len(patterns) + 1) for some in combinations(patterns, count)
        ]
        found = []
        for some in sets:
            schema = shape.schema_of_others(some)
            types = self._types_of_others(shape, some)
            value = self._value(schema, types) if types else None
            if value is None:
                continue
            unlike = [f"~{terminals[one]}" for one in patterns if one not in some]
            like = [terminals[one] for one in some]
            key = " & ".join([_name_terminal(shape.names), *like, *unlike])
            head = self._terminal(f"{literal(PARAMETER)} ({key}) {literal(_NAME_END)}")
            found.append(f"{head} {value}")
        return found

    def _types_of_others(self, shape: Shape, patterns: Sequence[str]) -> frozenset[str]:
        """The types as which the parser reads such a parameter, whatever its name is."""
        found = types_of(shape.schema_of_others(patterns), self._root)
        for other in self._tool.shapes.all if found else ():
            if other is not shape:
                found |= types_of(other.schema_of_others(()), self._root)
        return found

    def _pattern(self, pattern: str) -> str:
        found = searched(pattern)
        self._refuse_if(found is None, f"the pattern {pattern!r} cannot be bound")
        return _ANY if found is None else regex_terminal(found)

    # --- values -----------------------------------------------------------------------------------

    def _value(self, schema: Any, read_as: frozenset[str]) -> str | None:
        """What follows the opening tag, through the closing one. None if no value matches.

        read_as: the types by which the parser reads it, which are all that any alternative has.
        """
        types = types_of(schema, self._root) & read_as
        values = values_of(schema, self._root)
        if values is not None and not self._has(schema, ("pattern",)):
            texts = [_written(one, read_as) for one in values if _is_of(one, types)]
            return self._choice([literal(text + _TAIL) for text in texts if text is not None])
        terminals = [
            literal(dump(one))
            for one in (None, True, False)
            if _is_of(one, types) and allows(schema, self._root, one)
        ]
        numbers = types & {"integer", "number"}
        words = self._numbers(schema, numbers)
        in_json = types & {"object", "array"}
        if words is None:
            in_json |= numbers
        terminals += words or ()
        if "string" in types:
            terminals += self._texts_of(schema, read_as, words is None)
        options = []
        if terminals:
            options.append(self._terminal(f"({' | '.join(terminals)}) {literal(_TAIL)}"))
        if in_json:
            options.append(f"{self._json(schema, types, in_json)} {literal(_TAIL)}")
        return self._choice(options)

    def _numbers(self, schema: Any, types: frozenset[str]) -> list[str] | None:
        """Terminals of the numbers that are allowed; None if only the matcher's JSON binds them."""
        if not types:
            return []
        values = values_of(schema, self._root)
        if values is not None:
            return [literal(dump(one)) for one in values if _is_of(one, types)]
        if not self._has(schema, (*_NUMBER_WORDS, "const", "enum")):
            return [f"/{NUMBER.pattern if 'number' in types else _WHOLE}/"]
        keys = schema.keys() - _ANNOTATIONS - {"type"}
        if types == {"integer"} and keys <= _BOUNDS:
            least, most = _whole_bounds(schema)
            if max(abs(least or 0), abs(most or 0)) > MAX_BOUND:
                return None
            pattern = whole_numbers(least, most)
            return [] if pattern is None else [f"/{pattern}/"]
        if keys != {"anyOf"}:
            return None
        found: list[str] = []
        for option in schema["anyOf"]:
            words = self._numbers(option, types_of(option, self._root) & types)
            if words is None:
                return None
            found += words
        return found

    def _choice(self, options: list[str]) -> str | None:
        if not options:
            return None
        return options[0] if len(options) == 1 else f"({' | '.join(options)})"

    def _json(self, schema: Any, types: frozenset[str], wanted: frozenset[str]) -> str:
        names = sorted(wanted - {"integer"} if "number" in wanted else wanted)
        try:
            part = bundled(schema, self._root)
        except LookupError as error:
            raise UnboundError(f"Pointer '{error.args[0]}' does not exist") from None
        if not isinstance(part, dict) or not part:
            part = {"type": names}
        elif types != wanted:
            definitions = part.pop("$defs", {})
            part = {"$defs": definitions, "allOf": [part, {"type": names}]}
        return f"%json {schema_json(part, not self._exact)}"

    def _texts_of(self, schema: Any, read_as: frozenset[str], digits: bool) -> list[str]:
        """Terminals of the texts, bare and in quotes. digits: numbers are JSON of the matcher, with
        which a bare text must not begin then.
        """
        texts = self._texts(schema, 0)
        if texts is None:
            return []
        ambiguous = "|".join(AMBIGUOUS[kind] for kind in sorted(read_as & AMBIGUOUS.keys()))
        tagged = self._terminal(_TAGGED)
        bare = [texts.terminal, f"~{tagged}"]
        if ambiguous:
            bare.append(f'~/["\\\\]*(?:{ambiguous})["\\\\]*/')
        if digits:
            bare.append("~/-?[0-9](?s:.*)/")
        found = [f"({' & '.join(bare)})"]
        needy = tagged
        if ambiguous:
            needy += f' | /(?:\\\\["\\\\])*(?:{ambiguous})(?:\\\\["\\\\])*/'
        quote = literal('"')
        found.append(f"({quote} ({texts.in_quotes} & ({needy})) {quote})")
        return found

    def _texts(self, schema: Any, depth: int) -> _Texts | None:
        """The texts that a schema allows; None if there are none."""
        if schema is False:
            return None
        if not isinstance(schema, dict):
            return _bounded(0, None)
        if depth > _MAX_DEPTH:
            raise UnboundError("its references lead in a circle")
        if "string" not in types_of(schema, self._root):
            return None
        found: list[_Texts | None] = [self._own_texts(schema)]
        if isinstance(schema.get("$ref"), str):
            found.append(self._texts(resolve(schema["$ref"], self._root), depth + 1))
        found += [self._texts(part, depth + 1) for part in listed(schema, "allOf")]
        for key in ("anyOf", "oneOf"):
            options = [self._texts(part, depth + 1) for part in listed(schema, key)]
            if options:
                found.append(_any_of([one for one in options if one is not None]))
        return _all_of(found)

    def _own_texts(self, schema: dict[str, Any]) -> _Texts:
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        found = [_bounded(least, most)]
        texts = schema.get("enum") if "const" not in schema else [schema["const"]]
        if isinstance(texts, list):
            found.append(_listed([one for one in texts if isinstance(one, str)]))
        if isinstance(schema.get("pattern"), str):
            found.append(_Texts(self._pattern(schema["pattern"]), None))
        form = schema.get("format")
        if form in FORMATS:
            found.append(_Texts(regex_terminal(FORMATS[form]), None))
        self._refuse_if(form not in (None, "unknown", *FORMATS), f"Unknown format: {form}")
        return _all_of(found) or found[0]

    def _has(self, schema: Any, words: tuple[str, ...], depth: int = 0) -> bool:
        """Whether a schema, or one that it is combined of, says one of these."""
        if not isinstance(schema, dict) or depth > _MAX_DEPTH:
            return False
        parts = [part for key in ("allOf", "anyOf", "oneOf") for part in listed(schema, key)]
        if isinstance(schema.get("$ref"), str):
            parts.append(resolve(schema["$ref"], self._root))
        return any(word in schema for word in words) or any(
            self._has(part, words, depth + 1) for part in parts
        )

    # --- rules ------------------------------------------------------------------------------------

    def _rule(self, body: str) -> str:
        name = f"{self._name}_{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name


def _whole_bounds(schema: dict[str, Any]) -> tuple[int | None, int | None]:
    """The least and the greatest whole number within a schema's bounds."""
    least = [math.ceil(schema["minimum"])] if "minimum" in schema else []
    most = [math.floor(schema["maximum"])] if "maximum" in schema else []
    if "exclusiveMinimum" in schema:
        least.append(math.floor(schema["exclusiveMinimum"]) + 1)
    if "exclusiveMaximum" in schema:
        most.append(math.ceil(schema["exclusiveMaximum"]) - 1)
    return max(least, default=None), min(most, default=None)


def _is_of(value: Any, types: frozenset[str]) -> bool:
    return bool(types_of({"const": value}, None) & types)


def _written(value: Any, read_as: frozenset[str]) -> str | None:
    """A value as a parameter's text; None for one that would be read as another."""
    if not isinstance(value, str):
        return dump(value)
    return dump(value) if needs_quotes(value, read_as) else value


def _is_writable(name: str) -> bool:
    return name_at(f"{name}>", 0, True) == (name, len(name) + 1)


def _name_terminal(names: Sequence[str]) -> str:
    edge = r"""[^<>\n\s"']"""
    shape = rf"/{edge}(?:[^<>\n]{{0,{MAX_NAME - 2}}}{edge})?/"
    return f"({shape} & ~({' | '.join(map(literal, names))}))" if names else shape


def _intersection(terminals: Sequence[str]) -> str:
    kept = list(dict.fromkeys(one for one in terminals if one != _ANY))
    return kept[0] if len(kept) == 1 else f"({' & '.join(kept)})" if kept else _ANY


def _bounded(least: int, most: int | None) -> _Texts:
    free = least == 0 and most is None
    terminal = _ANY if free else regex_terminal(lengths(least, most))
    return _Texts(terminal, f"/{_UNIT}{{{least},{'' if most is None else most}}}/", (least, most))


def _listed(texts: Sequence[str]) -> _Texts:
    bare = " | ".join(map(literal, texts))
    quoted = " | ".join(literal(dump(text)[1:-1]) for text in texts)
    return _Texts(f"({bare})", f"({quoted})")


def _all_of(texts: Sequence[_Texts | None]) -> _Texts | None:
    found = [one for one in texts if one is not None]
    if len(found) < len(texts):
        return None
    kept = [one for one in found if one.terminal != _ANY] or found[:1]
    if len(kept) == 1:
        return kept[0]
    bounds = [one.bounds for one in kept if one.bounds is not None]
    if len(bounds) == len(kept):
        mosts = [most for _, most in bounds if most is not None]
        return _bounded(max(least for least, _ in bounds), min(mosts, default=None))
    return _Texts(_intersection([one.terminal for one in kept]), None)


def _any_of(texts: Sequence[_Texts]) -> _Texts | None:
    if len(texts) < 2:
        return texts[0] if texts else None
    terminals = " | ".join(one.terminal for one in texts)
    return _Texts(f"({terminals})", f"({' | '.join(one.in_quotes for one in texts)})")
