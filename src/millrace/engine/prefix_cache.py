"""The prefix cache: a tree of prompts by pages of tokens, and the pools of pages and snapshots.

Pages and snapshots are numbers here; the runtime owns the memory behind them.

A hybrid model can resume a prompt only where its recurrent state was saved. So a *snapshot* makes a
prefix reusable, together with the KV pages on the path to it. Hence the rule of the tree: a node
(one page of tokens) owns its page only while a snapshot is at the node or below it. A node without
one is a *ghost*: it keeps the tokens only, so that the next prompt can discover how far two prompts
are the same (a junction). It costs no device memory. To evict a snapshot turns the part of its path
that no other snapshot needs into ghosts.

Prompts under different salts share nothing: the first page of a path is found by its salt and its
tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

NULL_PAGE = 0
NO_SNAPSHOT = -1
Key = tuple[int | str, ...]


class Pool:
    """Numbers first .. first + size - 1, each free or in use, with a reference count.

    The prefix cache has at most one reference to each, by `retain_cached` and `release_cached`.
    """

    def __init__(self, size: int, first: int = 0) -> None:
        self.size = size
        self._first = first
        self._counts = [0] * size
        self._cached = bytearray(size)  # 1 where the prefix cache has a reference
        self._evictable = 0
        self._free = list(range(first + size - 1, first - 1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def evictable(self) -> int:
        """How many numbers only the prefix cache refers to."""
        return self._evictable

    def allocate(self, count: int) -> list[int]:
        """`count` free numbers, lowest first on a fresh pool. The caller has checked `free`."""
        if count > len(self._free):
            raise RuntimeError(f"pool: {count} requested, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for number in taken:
            self._counts[number - self._first] = 1
        return taken

    def retain(self, number: int) -> None:
        """Add a reference to a number that is in use."""
        index = number - self._first
        if self._counts[index] < 1:
            raise RuntimeError(f"pool: {number} is free and cannot be shared")
        self._change_count(index, 1)

    def release(self, number: int) -> None:
        """Remove a reference; the last one frees the number."""
        index = number - self._first
        if self._counts[index] < 1:
            raise RuntimeError(f"pool: {number} freed twice")
        self._change_count(index, -1)
        if self._counts[index] == 0:
            self._free.append(number)

    def retain_cached(self, number: int) -> None:
        """`retain` for the prefix cache, at most once for each number."""
        self.retain(number)
        self._cached[number - self._first] = 1

    def release_cached(self, number: int) -> None:
        """`release` for the prefix cache."""
        index = number - self._first
        self._evictable -= self._counts[index] == 1
        self._cached[index] = 0
        self.release(number)

    def _change_count(self, index: int, change: int) -> None:
        """Change a reference count, and the count of evictable numbers with it."""
        cached = self._cached[index]
        self._evictable -= cached and self._counts[index] == 1
        self._counts[index] += change
        self._evictable += cached and self._counts[index] == 1

    def ref_count(self, number: int) -> int:
        return self._counts[number - self._first]


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


@dataclass(frozen=True, slots=True)
class Match:
    """The cached prefix of a prompt.

    tokens: prompt tokens that `snapshot` and `pages` cover. shared: tokens that an earlier prompt
    began with too; if that is more than `tokens`, a snapshot at `shared` is worth taking.
    """

    tokens: int
    pages: list[int]
    snapshot: int
    shared: int


class PrefixTree:
    """A radix tree of prompts, one node a page of tokens, with snapshots to resume from.

    pages, snapshots: the pools that it takes references from. At most `max_nodes` nodes, but the
    path of the newest prompt stays whole. version: grows when a snapshot is added or evicted.
    """

    def __init__(
        self, page_size: int, pages: Pool, snapshots: Pool, max_nodes: int = 1 << 16
    ) -> None:
        self._page_size = page_size
        self._pages = pages
        self._snapshots = snapshots
        self._max_nodes = max_nodes
        self.version = 0
        self._root = Node(parent=None, key=(), depth=0)
        self._num_nodes = 0
        self._recent: OrderedDict[Node, None] = OrderedDict()  # nodes with a snapshot, oldest first
        self._ghosts: OrderedDict[Node, None] = OrderedDict()  # childless ghosts, oldest first

    def match(self, tokens: Sequence[int], salt: str = "") -> Match:
        """The longest prefix to resume from; never the whole prompt: at least one token is left."""
        path = self._walk(tokens, self.round_down(len(tokens) - 1), salt)
        shared = path[-1].depth if path else 0
        while path and path[-1].snapshot == NO_SNAPSHOT:
            path.pop()
        if not path:
            return Match(0, [], NO_SNAPSHOT, shared)
        for node in path:
            if node in self._recent:
                self._recent.move_to_end(node)
        return Match(path[-1].depth, [n.page for n in path], path[-1].snapshot, shared)

    def cached(self, tokens: Sequence[int], salt: str = "") -> int:
        """How many tokens `match` would find now. It does not count as a use of them."""
        path = self._walk(tokens, self.round_down(len(tokens) - 1), salt)
        return next((n.depth for n in reversed(path) if n.snapshot != NO_SNAPSHOT), 0)

    def has_snapshot(self, tokens: Sequence[int], depth: int, salt: str = "") -> bool:
        """Whether tokens[:depth] can be resumed from already."""
        path = self._walk(tokens, depth, salt)
        return bool(path) and path[-1].depth == depth and path[-1].snapshot != NO_SNAPSHOT

    def record_prompt(self, tokens: Sequence[int], salt: str = "") -> None:
        """Add the full pages of a prompt as ghosts, so that later prompts discover what they
        share."""
        self._extend(tokens, self.round_down(len(tokens) - 1), salt)

    def publish(
        self, tokens: Sequence[int], pages: Sequence[int], snapshot: int, salt: str = ""
    ) -> None:
        """Insert tokens (full pages, all computed) with their pages and the snapshot at their end.

        Takes over the caller's reference to `snapshot`, and adds one to each page. If there is a
        snapshot already, `snapshot` is freed.
        """
        node = self._extend(tokens, len(tokens), salt)
        if node is self._root or node.snapshot != NO_SNAPSHOT:
            self._snapshots.release(snapshot)
            return
        self.version += 1
        node.snapshot = snapshot
        self._recent[node] = None
        self._ghosts.pop(node, None)
        for ancestor in _path(node):
            if ancestor.snapshots_below == 0:
                ancestor.page = pages[ancestor.depth // self._page_size - 1]
                self._pages.retain_cached(ancestor.page)
            ancestor.snapshots_below += 1

    def evict(self) -> bool:
        """Free the least recently used snapshot and the pages that only it needs. False: none
        left."""
        if not self._recent:
            return False
        self.version += 1
        node, _ = self._recent.popitem(last=False)
        self._snapshots.release(node.snapshot)
        node.snapshot = NO_SNAPSHOT
        for ancestor in _path(node):
            ancestor.snapshots_below -= 1
            if ancestor.snapshots_below == 0:
                self._pages.release_cached(ancestor.page)
                ancestor.page = NULL_PAGE
        if not node.children:
            self._ghosts[node] = None
        return True

    def clear(self) -> None:
        """Remove every node, snapshot and page."""
        while self.evict():
            pass
        self._root.children.clear()
        self._ghosts.clear()
        self._num_nodes = 0

    def round_down(self, length: int) -> int:
        """`length` rounded down to full pages."""
        return max(0, length) // self._page_size * self._page_size

    @property
    def num_snapshots(self) -> int:
        """Snapshots in the tree."""
        return len(self._recent)

    def cached_pages(self) -> list[int]:
        """Every page that the tree refers to (for integrity checks)."""
        return [node.page for node in self._nodes() if node.page != NULL_PAGE]

    def check(self) -> None:
        """Raise AssertionError if an invariant of the tree is broken."""
        nodes = self._nodes()
        assert len(nodes) == self._num_nodes, "node count"
        for node in nodes:
            below = sum(child.snapshots_below for child in node.children.values())
            assert node.snapshots_below == below + (node.snapshot != NO_SNAPSHOT), (
                "snapshots_below count"
            )
            assert (node.page != NULL_PAGE) == (node.snapshots_below > 0), "ghosts have no page"
            assert (node in self._recent) == (node.snapshot != NO_SNAPSHOT), "snapshot order"
            ghost_leaf = not node.children and node.snapshot == NO_SNAPSHOT
            assert (node in self._ghosts) == ghost_leaf, "ghost order"

    def _nodes(self) -> list[Node]:
        found, stack = [], list(self._root.children.values())
        while stack:
            node = stack.pop()
            found.append(node)
            stack.extend(node.children.values())
        return found

    def _walk(self, tokens: Sequence[int], length: int, salt: str) -> list[Node]:
        path: list[Node] = []
        node = self._root
        size = self._page_size
        for start in range(0, length, size):
            child = node.children.get(_key(tokens[start : start + size], "" if start else salt))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _extend(self, tokens: Sequence[int], length: int, salt: str) -> Node:
        """The node of tokens[:length]; missing nodes on the path are created."""
        path = self._walk(tokens, length, salt)
        node = path[-1] if path else self._root
        for start in range(node.depth, length, self._page_size):
            self._ghosts.pop(node, None)
            key = _key(tokens[start : start + self._page_size], "" if start else salt)
            child = Node(parent=node, key=key, depth=start + self._page_size)
            node.children[key] = child
            node = child
            self._num_nodes += 1
        if node is not self._root and not node.children and node.snapshot == NO_SNAPSHOT:
            self._ghosts[node] = None
            self._ghosts.move_to_end(node)
        self._trim(spare=node)
        return node

    def _trim(self, spare: Node) -> None:
        """Remove ghosts without children, oldest first, until the tree has at most max_nodes
        nodes."""
        while self._num_nodes > self._max_nodes and self._ghosts:
            node = next(iter(self._ghosts))
            if node is spare:
                break
            del self._ghosts[node]
            parent = node.parent
            assert parent is not None
            del parent.children[node.key]
            self._num_nodes -= 1
            if parent.parent and not parent.children and parent.snapshot == NO_SNAPSHOT:
                self._ghosts[parent] = None
                self._ghosts.move_to_end(parent, last=False)


def _key(page: Sequence[int], salt: str) -> Key:
    return (salt, *page) if salt else tuple(page)


def _path(node: Node) -> list[Node]:
    """The node and its ancestors below the root."""
    path = []
    at: Node | None = node
    while at is not None and at.parent is not None:
        path.append(at)
        at = at.parent
    return path
