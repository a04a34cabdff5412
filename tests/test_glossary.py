"""The glossary and the code use the same words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = sorted((ROOT / "src" / "millrace").rglob("*.py"))
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
ENTRIES = [line for line in GLOSSARY.splitlines() if line.startswith("- ")]
TERMS = [term for entry in ENTRIES for term in re.findall(r"\*\*([^*]+)\*\*", entry)]

# Words that the glossary's terms have replaced; no part of an identifier is one of them.
RETIRED = {
    "carried", "checkup", "desk", "door", "front", "holdings", "keeper", "picker", "planlog",
    "rehearsal", "rehearse", "remember", "toolset", "wishes",
}  # fmt: skip


def identifiers(path: Path) -> Iterator[str]:
    """Names of the module, its classes, functions, parameters, variables and attributes."""
    yield path.stem
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def words(identifier: str) -> set[str]:
    """The words of a snake_case or CamelCase name, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)}


def test_terms_are_sorted_and_explained_once() -> None:
    first = [TERMS[TERMS.index(entry.split("**")[1])].lower() for entry in ENTRIES]
    assert first == sorted(first)
    assert len(set(TERMS)) == len(TERMS)


def test_every_term_is_used() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE)
    text = (source + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", source)).lower()  # CamelCase as words
    gap = r"[\s_#-]+"

    def is_used(term: str) -> bool:
        stem = term.lower().removesuffix("ion")  # ejection: the code has eject, ejected
        pattern = gap.join(map(re.escape, re.split(r"[ -]", stem)))
        return re.search(rf"(?<![a-z]){pattern}(e?s|e?d|ions?)?(?![a-z])", text) is not None

    assert [term for term in TERMS if not is_used(term)] == []


def test_retired_words_are_gone() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCE
        for name in identifiers(path)
        if words(name) & RETIRED
    }
    assert found == set()
