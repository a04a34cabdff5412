"""Prompts as paths in a tree: one node for each page of tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from millrace.engine.cache.policy import NO_SNAPSHOT, Difference, Kind
from millrace.engine.cache.pool import NULL_PAGE

MOST_COMPARED = 256  # pages that a page is compared with
Key = bytes | tuple[str, bytes]  # packed tokens; in the first page with the salt, if there is one
TOKEN_BYTES = 4


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
    """One page of tokens, behind its parent's. key: see `Key`; fewer tokens than a page for a
    *tail*, the unfinished last page of a sequence, which has no children. snapshots_below:
    snapshots at it and below it. tails: its children that are tails.

    Of nodes with a snapshot: kind; above: the nearest ancestor with one, else the root; below: the
    nodes whose `above` it is; uses: how often its conversation came back, here or
    in earlier turns; branches: how often a prompt resumed here although there were snapshots below;
    returned: whether any did; used_at: when it was last used, seconds; order: uses are numbered;
    alike: the rates of the prompts that begin as it does, which are kept as `rates`
    of one of its ancestors. lost: the snapshot that it had, or one of its tails.
    pinned_until: seconds; it is evicted after all others until then. tag: of the request that it
    was made for.
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
    pinned_until: float = 0.0
    tag: int = 0


def root_node() -> Node:
    return Node(parent=None, key=b"", depth=0)


def round_down(length: int, page_size: int) -> int:
    """`length` rounded down to whole pages."""
    return max(0, length) // page_size * page_size


def packed(tokens: Sequence[int]) -> bytes:
    """Tokens as bytes: slices of these are hashed and compared far faster than tuples of numbers.
    An array of int32 is only copied."""
    numbers = tokens if isinstance(tokens, array) and tokens.typecode == "i" else array("i", tokens)
    return numbers.tobytes()


def page_key(data: bytes, start: int, end: int, salt: str) -> Key:
    """The key of tokens[start:end] of packed tokens, which begin a page; the first one has the
    salt."""
    page = data[TOKEN_BYTES * start : TOKEN_BYTES * end]
    return (salt, page) if salt and not start else page


def page_tokens(key: Key) -> bytes:
    """The packed tokens of a key."""
    return key if isinstance(key, bytes) else key[1]


def _salt_of(key: Key) -> str:
    return "" if isinstance(key, bytes) else key[0]


def pages_of(length: int, page_size: int) -> int:
    """Pages that hold `length` tokens."""
    return -(-length // page_size)


def walk(root: Node, tokens: Sequence[int], length: int, page_size: int, salt: str) -> list[Node]:
    """The nodes of tokens[:length], as far as there are any."""
    path: list[Node] = []
    node, data = root, packed(tokens[:length])
    step = TOKEN_BYTES * page_size
    for start in range(0, len(data), step):
        key = data[start : start + step]  # as `page_key`
        child = node.children.get((salt, key) if salt and not start else key)
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
        if node is root and _salt_of(child.key) != salt:
            continue
        key = array("i", page_tokens(child.key)).tolist()
        same = next((i for i, (a, b) in enumerate(zip(key, rest, strict=False)) if a != b), -1)
        same = min(len(key), len(rest)) if same < 0 else same
        if same >= best:
            best, other = same, key[same:]
    evicted = next((one.depth for one in reversed(path) if one.lost is not None), 0)
    return Difference(node.depth + best, other, evicted)


def begins_with(node: Node, other: Node) -> bool:
    """Whether the tokens of `node` begin with all of the tokens of `other`, which may be a tail."""
    wanted, salt = page_tokens(other.key), _salt_of(other.key)
    at: Node | None = node
    while at is not None and at.parent is not None:
        if at is other:
            return True
        if at.parent is other.parent:
            longer = len(page_tokens(at.key)) > len(wanted)
            return longer and page_tokens(at.key).startswith(wanted) and _salt_of(at.key) == salt
        at = at.parent
    return False
