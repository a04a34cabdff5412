"""Prompts as paths in a tree: one node for each page of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from millrace.engine.cache.policy import NO_SNAPSHOT, Difference, Kind
from millrace.engine.cache.pool import NULL_PAGE

MOST_COMPARED = 256  # pages that a page is compared with
Key = tuple[int | str, ...]


@dataclass(slots=True)
class Rates:
    """Of the snapshots below a node, by kind: how many there were, and how many were ever used."""

    made: list[int] = field(default_factory=lambda: [0] * len(Kind))
    used: list[int] = field(default_factory=lambda: [0] * len(Kind))


@dataclass(slots=True)
class Lost:
    """A snapshot that was evicted: as in Node. Who would have used it is seen all the same."""

    kind: Kind
    uses: int
    returned: bool
    alike: Rates


@dataclass(eq=False, slots=True)
class Node:
    """One page of tokens, behind its parent's. key: the tokens, in the first page behind the salt
    if there is one; fewer than a page for a *tail*, the unfinished last page of a sequence, which
    has no children. snapshots_below: snapshots at it and below it. tails: its children that are
    tails.

    Of nodes with a snapshot: kind; above: the nearest ancestor with one, else the root; below: the
    nodes whose `above` it is; uses: how often its conversation came back, here or
    in earlier turns; branches: how often a prompt resumed here although there were snapshots below;
    returned: whether any did; used_at: when it was last used, seconds; order: uses are numbered;
    alike: the rates of the prompts that begin as it does, which are kept as `rates`
    of one of its ancestors. lost: the snapshot that it had, or one of its tails.
    """

    parent: Node | None
    key: Key
    depth: int  # tokens from the root to the end of this page
    page: int = NULL_PAGE
    snapshot: int = NO_SNAPSHOT
    snapshots_below: int = 0
    tails: int = 0
    children: dict[Key, Node] = field(default_factory=dict)
    kind: Kind = Kind.PROMPT
    above: Node | None = None
    below: dict[Node, None] = field(default_factory=dict)
    uses: int = 0
    branches: int = 0
    returned: bool = False
    alike: Rates | None = None
    used_at: float = 0.0
    order: int = 0
    rates: Rates | None = None
    lost: Lost | None = None
    salt: str = ""


def root_node() -> Node:
    return Node(parent=None, key=(), depth=0)


def round_down(length: int, page_size: int) -> int:
    """`length` rounded down to whole pages."""
    return max(0, length) // page_size * page_size


def page_key(tokens: Sequence[int], start: int, page_size: int, salt: str) -> Key:
    """The key of the page that begins at `start`: in the first one it includes the salt."""
    page = tokens[start : start + page_size]
    return (salt, *page) if salt and not start else tuple(page)


def pages_of(length: int, page_size: int) -> int:
    """Pages that hold `length` tokens."""
    return -(-length // page_size)


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


def difference(
    root: Node, path: list[Node], tokens: Sequence[int], page_size: int, salt: str
) -> Difference:
    """Where the tokens leave the tree. path: the nodes of their whole pages that are in it."""
    node = path[-1] if path else root
    rest = list(tokens[node.depth : node.depth + page_size])
    best, other = 0, list[int]()
    for child in islice(node.children.values(), MOST_COMPARED):
        key = [part for part in child.key if isinstance(part, int)]
        if node is root and (child.key[0] == salt) != bool(salt):
            continue  # of another salt
        same = next((i for i, (a, b) in enumerate(zip(key, rest, strict=False)) if a != b), -1)
        same = min(len(key), len(rest)) if same < 0 else same
        if same >= best:
            best, other = same, key[same:]
    evicted = next((one.depth for one in reversed(path) if one.lost is not None), 0)
    return Difference(node.depth + best, other, evicted)


def begins_with(node: Node, other: Node) -> bool:
    """Whether the tokens of `node` begin with all of the tokens of `other`, which may be a tail."""
    size = len(other.key)
    at: Node | None = node
    while at is not None and at.parent is not None:
        if at is other:
            return True
        if at.parent is other.parent:
            return len(at.key) > size and at.key[:size] == other.key
        at = at.parent
    return False
