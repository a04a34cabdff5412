"""Prompts as paths in a tree: one node for each page of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from millrace.engine.cache.policy import NO_SNAPSHOT
from millrace.engine.cache.pool import NULL_PAGE

Key = tuple[int | str, ...]


@dataclass(eq=False, slots=True)
class Node:
    """One page of tokens, behind its parent's. key: the tokens, in the first page behind the salt
    if there is one. snapshots_below: snapshots at it and below it."""

    parent: Node | None
    key: Key
    depth: int  # tokens from the root to the end of this page
    page: int = NULL_PAGE
    snapshot: int = NO_SNAPSHOT
    snapshots_below: int = 0
    children: dict[Key, Node] = field(default_factory=dict)


def root_node() -> Node:
    return Node(parent=None, key=(), depth=0)


def round_down(length: int, page_size: int) -> int:
    """`length` rounded down to whole pages."""
    return max(0, length) // page_size * page_size


def page_key(tokens: Sequence[int], start: int, page_size: int, salt: str) -> Key:
    """The key of the page that begins at `start`: in the first one it includes the salt."""
    page = tokens[start : start + page_size]
    return (salt, *page) if salt and not start else tuple(page)


def walk(root: Node, tokens: Sequence[int], length: int, page_size: int, salt: str) -> list[Node]:
    """The nodes of tokens[:length], as far as there are any."""
    path: list[Node] = []
    node = root
    for start in range(0, length, page_size):
        child = node.children.get(page_key(tokens, start, page_size, salt))
        if child is None:
            break
        path.append(child)
        node = child
    return path


def descendants(root: Node) -> list[Node]:
    found, stack = [], list(root.children.values())
    while stack:
        node = stack.pop()
        found.append(node)
        stack.extend(node.children.values())
    return found


def ancestors(node: Node) -> list[Node]:
    """The node and its ancestors below the root."""
    path = []
    at: Node | None = node
    while at is not None and at.parent is not None:
        path.append(at)
        at = at.parent
    return path
