"""JSON Schema as far as a tool's parameters need it: references and the types of values.

Knows no tool and no grammar. Nothing here raises for a wrong schema; who compiles it does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

SCALARS = frozenset({"null", "boolean", "integer", "number"})
EVERY = SCALARS | {"string", "array", "object"}
TEXT = frozenset({"string"})

DEFINITIONS = ("$defs", "definitions")  # the keywords for shared parts
MAX_DEFINITIONS = 1000  # of a schema
MAX_SCHEMA_DEPTH = 100  # objects and arrays within each other
MAX_SCHEMA_NODES = 20_000  # objects and arrays in all
_MAX_DEPTH = 32  # of references and combinations; deeper ones, and circles, bind no type


def schema_limit_error(schema: Any) -> str:
    """The limit that a schema exceeds; empty if it exceeds none. Never recurses."""
    nodes = definitions = 0
    level, depth = [schema], 0
    while level:
        depth += 1
        below: list[Any] = []
        for node in level:
            if not isinstance(node, (dict, list)):
                continue
            nodes += 1
            if isinstance(node, dict):
                named = (node.get(key) for key in DEFINITIONS)
                definitions += sum(len(one) for one in named if isinstance(one, dict))
                below.extend(node.values())
            else:
                below.extend(node)
        if nodes > MAX_SCHEMA_NODES:
            return f"the schema has more than {MAX_SCHEMA_NODES} objects and arrays"
        if definitions > MAX_DEFINITIONS:
            return f"the schema has {definitions} definitions; at most {MAX_DEFINITIONS} work"
        level = [node for node in below if isinstance(node, (dict, list))]
        if level and depth >= MAX_SCHEMA_DEPTH:
            return f"the schema is nested too deeply; at most {MAX_SCHEMA_DEPTH} levels work"
    return ""


def resolve(reference: str, root: Any) -> Any:
    """The schema that `#` or `#/a/b` points to (or `/a/b`, as some write it); None if there is
    none."""
    if reference == "#":
        return root
    reference = f"#{reference}" if reference.startswith("/") else reference
    if not reference.startswith("#/"):
        return None
    node = root
    for step in reference[2:].split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        else:
            node = node.get(name) if isinstance(node, Mapping) else None
    return node


def type_of(value: Any) -> str:
    """A value's type in JSON Schema; integer for every whole number."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "integer" if value == value // 1 else "number"
    if value is None:
        return "null"
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, Mapping) else "array"


def types_of(schema: Any, root: Any) -> frozenset[str]:
    """The types that values may have. `number` comes with `integer`, not the other way round.

    Each part is read once, however often it is referred to; one that refers to itself binds no
    type there.
    """
    return _types_of(schema, root, 0, {})


def _types_of(
    schema: Any, root: Any, depth: int, known: dict[int, frozenset[str]]
) -> frozenset[str]:
    if schema is False:
        return frozenset()
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return EVERY
    if id(schema) in known:
        return known[id(schema)]
    known[id(schema)] = EVERY  # while it is read
    found = _named_types(schema.get("type"))
    if isinstance(schema.get("enum"), list):
        found &= {type_of(value) for value in schema["enum"]}
    if "const" in schema:
        found &= {type_of(schema["const"])}
    if isinstance(schema.get("$ref"), str):
        found &= _types_of(resolve(schema["$ref"], root), root, depth + 1, known)
    for part in listed(schema, "allOf"):
        found &= _types_of(part, root, depth + 1, known)
    for key in ("anyOf", "oneOf"):
        options = listed(schema, key)
        if options:
            types = (_types_of(one, root, depth + 1, known) for one in options)
            found &= frozenset().union(*types)
    known[id(schema)] = found
    return found


def _named_types(named: Any) -> frozenset[str]:
    names = {named} if isinstance(named, str) else named
    if not isinstance(names, (set, list)):
        return EVERY
    known = {name for name in names if isinstance(name, str)}
    return frozenset(known | {"integer"}) if "number" in known else frozenset(known)


def listed(schema: Mapping[str, Any], key: str) -> list[Any]:
    """The schemas of allOf, anyOf or oneOf; none where they are missing."""
    parts = schema.get(key)
    return parts if isinstance(parts, list) else []


def named(schema: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The schemas of properties or patternProperties by name; none where they are missing."""
    parts = schema.get(key)
    return parts if isinstance(parts, Mapping) else {}


def both(schemas: Sequence[Any]) -> Any:
    """The schema of what matches all of these."""
    rest = [one for one in schemas if one is not True and one != {}]
    return rest[0] if len(rest) == 1 else {"allOf": rest} if rest else True


def reads_as(pattern: str, text: str) -> bool:
    """Whether a schema's pattern finds something.

    False also for a pattern that Python cannot read, or cannot search within a bounded time:
    Python's search backtracks, so a client's pattern could stop the server.
    """
    if len(text) > _LONGEST_SEARCHED or not _searches_fast(pattern):
        return False
    try:
        return re.search(pattern, text) is not None
    except (re.error, OverflowError, RecursionError):
        return False


_LONGEST_SEARCHED = 128  # characters; names of arguments are no longer
_LONGEST_PATTERN = 200
_MAX_REPEATS = 2
_MAX_CHOICES = 12
_ATOM = re.compile(r"\\.|\[\^?\]?(?:[^\]\\]|\\.)*\]", re.DOTALL)


def _searches_fast(pattern: str) -> bool:
    """Whether the work of a search is bounded: few repeats and choices, and no repeated group."""
    if len(pattern) > _LONGEST_PATTERN:
        return False
    bare = _ATOM.sub("a", pattern).replace("(?", "(")
    return (
        len(re.findall(r"[*+?{]", bare)) <= _MAX_REPEATS
        and bare.count("|") <= _MAX_CHOICES
        and re.search(r"\)[*+?{]", bare) is None
    )


def allows(schema: Any, root: Any, value: Any, depth: int = 0) -> bool:
    """Whether a value is allowed, as far as types, listed values, combinations and the bounds of
    texts and numbers tell.
    """
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return schema is not False
    kind = type_of(value)
    if kind not in types_of({"type": schema.get("type", sorted(EVERY))}, root):
        return False
    if isinstance(schema.get("enum"), list) and not any(same(one, value) for one in schema["enum"]):
        return False
    if "const" in schema and not same(schema["const"], value):
        return False
    if not _within(schema, value):
        return False
    parts = listed(schema, "allOf")
    if isinstance(schema.get("$ref"), str):
        parts = [*parts, resolve(schema["$ref"], root)]
    if not all(allows(part, root, value, depth + 1) for part in parts):
        return False
    some, one = listed(schema, "anyOf"), listed(schema, "oneOf")
    if some and not any(allows(part, root, value, depth + 1) for part in some):
        return False
    return not one or sum(allows(part, root, value, depth + 1) for part in one) == 1


def same(one: Any, other: Any) -> bool:
    """Equal as JSON, where 1 is 1.0 and no boolean."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _within(schema: Mapping[str, Any], value: Any) -> bool:
    if isinstance(value, str):
        pattern = schema.get("pattern")
        least, most = schema.get("minLength", 0), schema.get("maxLength", len(value))
        return least <= len(value) <= most and (
            not isinstance(pattern, str) or reads_as(pattern, value)
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    return bool(
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and schema.get("exclusiveMinimum", value - 1) < value
        and value < schema.get("exclusiveMaximum", value + 1)
        and value % schema.get("multipleOf", value or 1) == 0
    )


def values_of(schema: Any, root: Any, depth: int = 0) -> list[Any] | None:
    """Every value that a schema allows where it lists them; None where it does not."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return None
    found: list[Any] | None = None
    if "const" in schema:
        found = [schema["const"]]
    elif isinstance(schema.get("enum"), list):
        found = schema["enum"]
    parts = listed(schema, "allOf")
    if isinstance(schema.get("$ref"), str):
        parts = [*parts, resolve(schema["$ref"], root)]
    for part in parts if found is None else ():
        found = values_of(part, root, depth + 1) if found is None else found
    for key in ("anyOf", "oneOf"):
        options = [values_of(part, root, depth + 1) for part in listed(schema, key)]
        if found is None and options and None not in options:
            found = [value for option in options for value in option or ()]
    return None if found is None else [one for one in found if allows(schema, root, one)]


def bundled(schema: Any, root: Any) -> Any:
    """A part of a schema as one that stands alone, with what its references point to."""
    names: dict[str, str] = {}
    made = _relinked(schema, names)
    if not names or not isinstance(made, dict):
        return made
    definitions: dict[str, Any] = {}
    while len(definitions) < len(names):
        reference = list(names)[len(definitions)]
        target = resolve(reference, root)
        if target is None:
            raise LookupError(reference)
        definitions[names[reference]] = _relinked(target, names)
    return {**made, "$defs": definitions}


def _relinked(schema: Any, names: dict[str, str]) -> Any:
    """A copy whose references lead to `names`, and new names for new references."""
    if isinstance(schema, list):
        return [_relinked(one, names) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str):
            made[key] = f"#/$defs/{names.setdefault(value, str(len(names)))}"
        elif key in ("const", "enum", "default", "examples"):
            made[key] = value
        elif key not in _LEFT_OUT or not isinstance(value, _LEFT_OUT[key]):
            made[key] = _relinked(value, names)
    return made


# Not carried over: they name the whole, or are reached by their references. A property may be
# called so, too; its schema is no text, and that of `$defs` no part of `properties`.
_LEFT_OUT = {"$id": str, "$schema": str, "$comment": str, "title": str, "description": str}
