"""The arguments of one function as a grammar of Qwen's format: what its schema allows, no more.

What `parser` and `values` read from a text that the grammar accepts matches the schema,
and each value that matches has such a text. A parameter's value is one terminal with the closing
tag behind it wherever it can be, since the matcher's lexer takes the longest terminal and never
goes back; objects, arrays and bounded numbers are the matcher's own JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from millrace.text.grammar import literal, schema_json
from millrace.text.number_terminals import LOWER, UPPER, bounded_numbers
from millrace.text.text_terminals import Terminals, TextTerminals, UnboundError
from millrace.text.tools.argument_shapes import Shape
from millrace.text.tools.call_tags import (
    FUNCTION,
    FUNCTION_END,
    MAX_NAME,
    PARAMETER,
    PARAMETER_END,
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
from millrace.text.tools.values import needs_quotes

_ANNOTATIONS = {"title", "description", "default", "examples", "$defs", "definitions"}
MAX_PATTERNS = 3  # of property names; each set of them is a rule
_MAX_DEPTH = 16

_WHOLE = f"-?(?:0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})"
_NUMBER_WORDS = (*LOWER, *UPPER, "multipleOf")
_NAME_END = ">\n"
_TAIL = f"\n{PARAMETER_END}\n"


class ArgumentGrammar:
    """Writes the rule `name`: a call of the tool in Qwen's format, without the outer tags.

    exact: raise UnboundError for what cannot be bound; else that binds nothing.
    """

    def __init__(self, tool: Tool, name: str, exact: bool, terminals: Terminals) -> None:
        self._terminal = terminals.name
        self._texts = TextTerminals(tool.parameters, exact, terminals)
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
        parts: list[str] = []
        names = self._names(shape)
        for name in names:
            others = [other.schema(name) for other in self._tool.shapes.all]
            value = self._value(
                shape.schema(name), self._tool.argument_types(name), self._digits_are_json(others)
            )
            if value is None or not _is_writable(name):
                if name in shape.required:
                    self._refuse_if(value is not None, f"no parameter can be called {name!r}")
                    return None
                continue
            rule = self._rule(f"{literal(f'{PARAMETER}{name}{_NAME_END}')} {value}")
            parts.append(rule if name in shape.required else f"{rule}?")
        entries = self._entries(shape, names)
        parts.append(self._map(shape, len(shape.required), len(parts), entries))
        return " ".join(part for part in parts if part) or '""'

    def _names(self, shape: Shape) -> list[str]:
        """The names that a shape lists, and those of its map that other shapes list: the parser
        reads such a parameter by the types of all of them.
        """
        others = [name for other in self._tool.shapes.all for name in other.names]
        mapped = [name for name in others if name not in shape.names and shape.types(name)]
        return list(dict.fromkeys([*shape.names, *mapped]))

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

    def _entries(self, shape: Shape, names: Sequence[str]) -> list[str]:
        """The parameters of other names: one rule for each set of patterns that may find them."""
        patterns = shape.patterns
        if len(patterns) > MAX_PATTERNS:
            self._refuse_if(True, f"more than {MAX_PATTERNS} patternProperties cannot be bound")
            return []
        terminals = {one: self._texts.pattern(one) for one in patterns}
        sets = [
            some for count in range(len(patterns) + 1) for some in combinations(patterns, count)
        ]
        found = []
        digits = self._digits_are_json([one for _, one in self._schemas_of_others()])
        for some in sets:
            schema = shape.schema_of_others(some)
            types = self._types_of_others(shape, some)
            value = self._value(schema, types, digits) if types else None
            if value is None:
                continue
            unlike = [f"~{terminals[one]}" for one in patterns if one not in some]
            like = [terminals[one] for one in some]
            key = " & ".join([_name_terminal(names), *like, *unlike])
            head = self._terminal(f"{literal(PARAMETER)} ({key}) {literal(_NAME_END)}")
            found.append(f"{head} {value}")
        return found

    def _types_of_others(self, shape: Shape, patterns: Sequence[str]) -> frozenset[str]:
        """The types as which the parser reads such a parameter, whatever its name is."""
        found = types_of(shape.schema_of_others(patterns), self._root)
        for other, schema in self._schemas_of_others() if found else ():
            if other is not shape:
                found |= types_of(schema, self._root)
        return found

    def _schemas_of_others(self) -> list[tuple[Shape, Any]]:
        """(shape, schema) of parameters that no shape lists, without a pattern and with each."""
        return [
            (shape, shape.schema_of_others(some))
            for shape in self._tool.shapes.all
            for some in [(), *((one,) for one in shape.patterns)]
        ]

    # --- values -----------------------------------------------------------------------------------

    def _digits_are_json(self, schemas: Sequence[Any]) -> bool:
        """Whether one of the schemas that a parameter may have needs the matcher's JSON for its
        numbers. Its lexer takes a longer text instead of such a number, so no bare text of any of
        them may begin with a digit.
        """
        numbers = frozenset({"integer", "number"})
        return any(
            self._numbers(one, types_of(one, self._root) & numbers) is None for one in schemas
        )

    def _value(self, schema: Any, read_as: frozenset[str], digits: bool) -> str | None:
        """What follows the opening tag, through the closing one. None if no value matches.

        read_as: the types by which the parser reads it, which are all that any alternative has.
        digits: as `TextTerminals.of` has it.
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
        words = None if digits and numbers else self._numbers(schema, numbers)
        in_json = types & {"object", "array"}
        if words is None:
            in_json |= numbers
        terminals += words or ()
        if "string" in types:
            terminals += self._texts.of(schema, read_as, digits)
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
        known = bounded_numbers(schema, self._root, whole="number" not in types)
        if known is not None:
            return known
        if schema.keys() - _ANNOTATIONS - {"type"} != {"anyOf"}:
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
