"""Numbers within bounds as terminals, where a schema says no more of them than that.

A number that stands bare beside texts must be a terminal like them: the matcher's lexer takes the
longest terminal and never goes back to a shorter number of its own JSON. Knows no text and no
function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from millrace.text.tools.json_schema import listed, resolve
from millrace.text.tools.text_patterns import at_least, at_most, whole_numbers

MAX_BOUND = 10**20  # numbers with greater bounds are the matcher's
MAX_MULTIPLES = 256  # of `multipleOf` within the bounds; they are listed
_SAFE_DIGITS = 15  # decimals of so many digits are different doubles if they are different
_MAX_DEPTH = 16

LOWER = ("minimum", "exclusiveMinimum")
UPPER = ("maximum", "exclusiveMaximum")
_SAID = {*LOWER, *UPPER, "multipleOf"}
_SILENT = {"type", "title", "description", "default", "examples", "format", "$defs", "definitions"}


def bounded_numbers(schema: Any, root: Any, whole: bool) -> list[str] | None:
    """Terminals of the numbers that a schema allows; None if it says more than terminals can.
    whole: only integers are allowed."""
    said = _constraints(schema, root, 0)
    if said is None or any(abs(bound) > MAX_BOUND for _, bound in said):
        return None
    steps = {bound for key, bound in said if key == "multipleOf"}
    if steps:
        return _multiples(said, steps, whole)
    if whole:
        least, most = _whole_bounds(said)
        pattern = whole_numbers(least, most)
        return [] if pattern is None else [f"/{pattern}/"]
    return _decimals(said)


def _constraints(schema: Any, root: Any, depth: int) -> list[tuple[str, Decimal]] | None:
    """(keyword, value) of all bounds, through references and allOf; None if there is more."""
    if depth > _MAX_DEPTH:
        return None
    if not isinstance(schema, Mapping):
        return [] if schema is True else None
    if schema.keys() - _SAID - _SILENT - {"$ref", "allOf"}:
        return None
    found = [(key, Decimal(repr(schema[key]))) for key in schema.keys() & _SAID]
    parts = listed(schema, "allOf")
    if isinstance(schema.get("$ref"), str):
        parts = [*parts, resolve(schema["$ref"], root)]
    for part in parts:
        inner = _constraints(part, root, depth + 1)
        if inner is None:
            return None
        found += inner
    return found


def _whole_bounds(said: list[tuple[str, Decimal]]) -> tuple[int | None, int | None]:
    """The least and the greatest whole number within the bounds."""
    least = [math.ceil(bound) for key, bound in said if key == "minimum"]
    least += [math.floor(bound) + 1 for key, bound in said if key == "exclusiveMinimum"]
    most = [math.floor(bound) for key, bound in said if key == "maximum"]
    most += [math.ceil(bound) - 1 for key, bound in said if key == "exclusiveMaximum"]
    return max(least, default=None), min(most, default=None)


def _multiples(
    said: list[tuple[str, Decimal]], steps: set[Decimal], whole: bool
) -> list[str] | None:
    """The whole multiples, listed; None if they are not whole, or too many."""
    least, most = _whole_bounds(said)
    if least is None or most is None or any(step != int(step) or step < 1 for step in steps):
        return None
    step = math.lcm(*(int(one) for one in steps))
    first = -(-least // step) * step
    if (most - first) // step >= MAX_MULTIPLES:
        return None
    ending = "" if whole else r"(?:\.0+)?"
    return [f"/{number}{ending}/" for number in range(first, most + 1, step)]


def _decimals(said: list[tuple[str, Decimal]]) -> list[str] | None:
    patterns = []
    for key, bound in said:
        is_open = key.startswith("exclusive")
        if len(bound.normalize().as_tuple().digits) > _SAFE_DIGITS:
            return None
        pattern = (at_least if key in LOWER else at_most)(bound, is_open)
        if pattern is None:
            return []
        patterns.append(f"/{pattern}/")
        if is_open:  # a number of more digits may be read as the bound
            patterns.append(f"/-?[0-9.]{{1,{_SAFE_DIGITS}}}/")
    return [f"({' & '.join(dict.fromkeys(patterns))})"]
