"""A tool's parameters as lists of named arguments: the shapes that the arguments of a call have.

Qwen's format writes an object as a list of parameters, so a schema that says what an object is by
references and combinations is taken apart here: each alternative is one shape. Knows no grammar.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from millrace.text.tools.json_schema import both, listed, named, reads_as, resolve, types_of

MAX_SHAPES = 64
MAX_PARTS = 1000
_MAX_DEPTH = 16


class Part(NamedTuple):
    """What one schema says of an object. additional: of properties that it does not name; None if
    it says nothing. lists: it has a list of properties, be it empty.
    """

    properties: Mapping[str, Any]
    patterns: Mapping[str, Any]
    additional: Any
    required: frozenset[str]
    least: int = 0
    most: int | None = None
    lists: bool = True


class Shape:
    """Objects that match all of some parts."""

    def __init__(self, parts: Sequence[Part], root: Any) -> None:
        self._parts = parts
        self._root = root
        self.required = frozenset().union(*(part.required for part in parts))
        names = [name for part in parts for name in part.properties]
        self.names = list(dict.fromkeys([*names, *sorted(self.required - set(names))]))
        self.patterns = list(dict.fromkeys(name for part in parts for name in part.patterns))
        self.is_open = self._is_open()
        self.least = max((part.least for part in parts), default=0)
        most = [part.most for part in parts if part.most is not None]
        self.most = min(most, default=None)

    def _is_open(self) -> bool:
        """Whether properties may have other names than those that are told.

        JSON Schema allows that unless it is forbidden. Here it must be said, or nothing else be:
        where properties are listed, a model that makes up others is wrong.
        """
        said = [part.additional for part in self._parts if part.additional is not None]
        return False not in said if said else not any(part.lists for part in self._parts)

    def schema(self, name: str) -> Any:
        """What a property must match; False if there cannot be one of that name."""
        return both([one for part in self._parts for one in _bound(part, name)])

    def schema_of_others(self, patterns: Sequence[str]) -> Any:
        """What a property must match whose name only these patterns find."""
        found: list[Any] = []
        for part in self._parts:
            matching = [part.patterns[one] for one in patterns if one in part.patterns]
            told = [True if part.additional is None else part.additional]
            found += matching or told
        return both(found) if patterns or self.is_open else False

    def tells(self, name: str) -> bool:
        """Whether a property of that name is listed, or found by a pattern."""
        return name in self.names or any(reads_as(one, name) for one in self.patterns)

    def types(self, name: str) -> frozenset[str]:
        """The types of a property; none if there cannot be one of that name."""
        if not self.tells(name) and not self.is_open:
            return frozenset()
        return types_of(self.schema(name), self._root)


def _bound(part: Part, name: str) -> list[Any]:
    found = [schema for pattern, schema in part.patterns.items() if reads_as(pattern, name)]
    if name in part.properties:
        found.append(part.properties[name])
    return found or [True if part.additional is None else part.additional]


class Shapes(NamedTuple):
    """The alternatives. problem: why they are not all of them; empty if they are."""

    all: list[Shape]
    problem: str


def shapes_of(schema: Any) -> Shapes:
    """The shapes of objects that match a schema."""
    problems: list[str] = []
    found = _expanded(schema, schema, 0, problems, Counter())
    return Shapes([Shape(parts, schema) for parts in found], problems[0] if problems else "")


_Alternatives = list[tuple[Part, ...]]


def _expanded(
    schema: Any, root: Any, depth: int, problems: list[str], read: Counter[str]
) -> _Alternatives:
    """read: counts the parts that were read, since shared parts are read again for each use."""
    read["parts"] += 1
    if read["parts"] > MAX_PARTS:
        problems.append(f"its references and combinations are more than {MAX_PARTS} parts")
        return [()]
    if schema is False:
        return []
    if not isinstance(schema, Mapping):
        return [()]
    if depth > _MAX_DEPTH:
        problems.append("its references lead in a circle")
        return [()]
    if "object" not in types_of({"type": schema["type"]} if "type" in schema else True, root):
        return []
    choices = [_own(schema)]
    reference = schema.get("$ref")
    if isinstance(reference, str):
        choices.append(_expanded(resolve(reference, root), root, depth + 1, problems, read))
    choices += [
        _expanded(part, root, depth + 1, problems, read) for part in listed(schema, "allOf")
    ]
    for key in ("anyOf", "oneOf"):
        options = [_expanded(one, root, depth + 1, problems, read) for one in listed(schema, key)]
        if options:
            choices.append([one for option in options for one in option])
    return _product(choices, problems)


def _product(choices: Sequence[_Alternatives], problems: list[str]) -> _Alternatives:
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MAX_SHAPES:
        problems.append(f"it has {count} alternatives of arguments; at most {MAX_SHAPES} work")
    found: _Alternatives = []
    for picked in product(*choices):
        if len(found) == MAX_SHAPES:
            break
        found.append(tuple(part for parts in picked for part in parts))
    return found


def _own(schema: Mapping[str, Any]) -> _Alternatives:
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return [
            (
                Part(
                    {key: {"const": one} for key, one in value.items()}, {}, False, frozenset(value)
                ),
            )
            for value in values
            if isinstance(value, Mapping)
        ]
    required = schema.get("required")
    least, most = schema.get("minProperties", 0), schema.get("maxProperties")
    return [
        (
            Part(
                named(schema, "properties"),
                named(schema, "patternProperties"),
                schema.get("additionalProperties"),
                frozenset(one for one in required if isinstance(one, str))
                if isinstance(required, list)
                else frozenset(),
                least if isinstance(least, int) else 0,
                most if isinstance(most, int) else None,
                lists="properties" in schema or "patternProperties" in schema,
            ),
        )
    ]


def _exactly(value: Mapping[str, Any]) -> Part:
    return Part({key: {"const": one} for key, one in value.items()}, {}, False, frozenset(value))
