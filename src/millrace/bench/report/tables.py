"""Tables as text that is also Markdown, no wider than a terminal."""

from __future__ import annotations

from collections.abc import Sequence

TERMINAL = 100  # columns


def aligned(rows: Sequence[Sequence[str]], keys: int = 1, width: int = TERMINAL) -> list[str]:
    """Lines of a table, its first row the headings; cells are right-aligned.

    A table that is too wide becomes several: each has the first `keys` columns, which say what a
    row is, and as many of the others as there is room for, one at least.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines: list[str] = []
    for columns in _parts(widths, keys, width):
        lines += [""] if lines else []
        lines += _lines([[row[i] for i in columns] for row in rows], [widths[i] for i in columns])
    return lines


def _parts(widths: Sequence[int], keys: int, width: int) -> list[list[int]]:
    """The columns of each table."""
    first = list(range(min(keys, len(widths))))
    free = width - 1 - sum(widths[i] + 3 for i in first)
    parts, used = [list(first)], 0
    for column in range(len(first), len(widths)):
        if used and used + widths[column] + 3 > free:
            parts.append(list(first))
            used = 0
        parts[-1].append(column)
        used += widths[column] + 3
    return parts


def _lines(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    lines = [
        "| " + " | ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *lines[1:]]
