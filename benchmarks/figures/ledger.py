"""Tables of LEDGER.md, found by their section and the words of a row.

A figure that asks for a number which the ledger no longer has fails, and is not drawn.
"""

from __future__ import annotations

import re
from pathlib import Path

LEDGER = Path(__file__).resolve().parents[1] / "LEDGER.md"


def section(title: str) -> str:
    """The text from a heading to the next one."""
    text = LEDGER.read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    if found is None:
        raise LookupError(f"LEDGER.md has no section {title!r}")
    return found.group(1)


def row(title: str, name: str, nth: int = 0) -> list[str]:
    """The cells of the nth row of a section whose first cell is `name`."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    found = [cells for cells in rows if cells[0] == name]
    if len(found) <= nth:
        raise LookupError(f"LEDGER.md, {title}: no row {name!r}")
    return found[nth]


def numbers(text: str) -> list[float]:
    """All numbers in a text, thousands with a comma."""
    found = re.findall(r"\d[\d,]*(?:\.\d+)?", text)
    return [float(one.rstrip(",").replace(",", "")) for one in found]


def sentence(title: str, start: str) -> str:
    """What follows `start` in a section, up to the end of the paragraph, as one line."""
    for paragraph in section(title).split("\n\n"):
        line = " ".join(paragraph.split())
        if start in line:
            return line[line.index(start) + len(start) :]
    raise LookupError(f"LEDGER.md, {title}: nothing says {start!r}")


def after(text: str, words: str) -> float:
    """The first number behind some words."""
    if words not in text:
        raise LookupError(f"LEDGER.md: {words!r} is not in {text[:60]!r}")
    return numbers(text[text.index(words) + len(words) :])[0]
