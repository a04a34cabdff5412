"""Tests use public names: a test that needs a private one asks for a narrow interface instead."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRIVATE = re.compile(r"_[a-zA-Z]\w*$")
PATCHES = {"setattr", "delattr", "getattr", "set_attribute"}
FEW = 10  # uses that are worth less than another interface


def defined(tree: ast.Module) -> Iterator[str]:
    """Private names that a file defines: functions, classes, variables, attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def used(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of what a file reads or replaces on other objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if getattr(node.value, "id", "") != "os":  # os._exit is the library's
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            constants = (arg.value for arg in node.args if isinstance(arg, ast.Constant))
            if name in PATCHES:
                yield from ((node.lineno, text) for text in constants if isinstance(text, str))


def test_tests_use_public_names() -> None:
    source = [ast.parse(path.read_text()) for path in (ROOT / "src").rglob("*.py")]
    private = {name for tree in source for name in defined(tree) if PRIVATE.match(name)}
    paths = sorted((ROOT / "tests").rglob("*.py"))
    trees = {path: ast.parse(path.read_text()) for path in paths}
    own = {name for tree in trees.values() for name in defined(tree)}
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path, tree in trees.items()
        for line, name in used(tree)
        if name in private - own
    ]
    assert len(found) <= FEW, "\n".join(found)
