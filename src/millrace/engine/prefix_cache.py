"""Who holds which page and which snapshot, and which prompts begin alike.

Pages and snapshots are numbers here; what lies behind a number is the runtime's affair.

A hybrid model can resume a prompt only where its recurrent state was kept, so a *snapshot* is what
makes a prefix reusable, and the KV pages on the way to it come along. Hence the tree's rule: a node
(one page of tokens) holds its page only while a snapshot lies at it or below it. A node without one
is a *ghost*: it remembers the tokens and so lets the next prompt discover how far two prompts are
shared (a junction), but costs no memory of the device. Evicting a snapshot turns the part of its
path that no other snapshot needs back into ghosts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

NULL_PAGE = 0
NO_SNAPSHOT = -1


class Pool:
    """Numbers first .. first + size - 1, each free or held by a count of holders.

    The prefix cache is a holder too, by `keep` and `evict`.
    """

    def __init__(self, size: int, first: int = 0) -> None:
        self.size = size
        self._first = first
        self._holders = [0] * size
        self._kept = bytearray(size)  # 1 where the prefix cache is one of the holders
        self._evictable = 0
        self._free = list(range(first + size - 1, first - 1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def evictable(self) -> int:
        """Numbers that the prefix cache alone holds."""
        return self._evictable

    def take(self, count: int) -> list[int]:
        """`count` free numbers, lowest first on a fresh pool. The caller has checked `free`."""
        if count > len(self._free):
            raise RuntimeError(f"pool: {count} wanted, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for number in taken:
            self._holders[number - self._first] = 1
        return taken

    def hold(self, number: int) -> None:
        """One more holder of a number that is held already."""
        index = number - self._first
        if self._holders[index] < 1:
            raise RuntimeError(f"pool: {number} is free and cannot be shared")
        self._count(index, 1)

    def drop(self, number: int) -> None:
        """One holder fewer; the last one frees the number."""
        index = number - self._first
        if self._holders[index] < 1:
            raise RuntimeError(f"pool: {number} freed twice")
        self._count(index, -1)
        if self._holders[index] == 0:
            self._free.append(number)

    def keep(self, number: int) -> None:
        """`hold` by the prefix cache, which does so once."""
        self.hold(number)
        self._kept[number - self._first] = 1

    def evict(self, number: int) -> None:
        """`drop` by the prefix cache."""
        index = number - self._first
        self._evictable -= self._holders[index] == 1
        self._kept[index] = 0
        self.drop(number)

    def _count(self, index: int, change: int) -> None:
        """Count a holder that comes or goes."""
        kept = self._kept[index]
        self._evictable -= kept and self._holders[index] == 1
        self._holders[index] += change
        self._evictable += kept and self._holders[index] == 1

    def holders(self, number: int) -> int:
        return self._holders[number - self._first]


@dataclass(eq=False, slots=True)
class Node:
    """One page of tokens that follows its parent's. `live` counts snapshots at it and below it."""

    parent: Node | None
    key: tuple[int, ...]
    depth: int  # tokens from the root up to and with this page
    page: int = NULL_PAGE
    snapshot: int = NO_SNAPSHOT
    live: int = 0
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Match:
    """What the tree knows of a prompt.

    tokens: prompt tokens that `snapshot` and `pages` cover. shared: tokens that some earlier prompt
    began with too; beyond `tokens` only as a memory, so a snapshot at `shared` is worth taking.
    """

    tokens: int
    pages: list[int]
    snapshot: int
    shared: int


class PrefixTree:
    """Prompts by their pages of tokens, with snapshots to resume from.

    Holds pages through `pages` and snapshots through `snapshots`. At most `max_nodes` nodes.
    version: grows whenever a snapshot comes or goes.
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
        self._count = 0
        self._recent: OrderedDict[Node, None] = OrderedDict()  # nodes with a snapshot, oldest first
        self._ghosts: OrderedDict[Node, None] = OrderedDict()  # childless ghosts, oldest first

    def match(self, tokens: Sequence[int]) -> Match:
        """The longest prefix to resume from; never the whole prompt: some token is left."""
        path = self._walk(tokens, self.aligned(len(tokens) - 1))
        shared = path[-1].depth if path else 0
        while path and path[-1].snapshot == NO_SNAPSHOT:
            path.pop()
        if not path:
            return Match(0, [], NO_SNAPSHOT, shared)
        for node in path:
            if node in self._recent:
                self._recent.move_to_end(node)
        return Match(path[-1].depth, [n.page for n in path], path[-1].snapshot, shared)

    def cached(self, tokens: Sequence[int]) -> int:
        """How many tokens `match` would find now; nothing counts as used by it."""
        path = self._walk(tokens, self.aligned(len(tokens) - 1))
        return next((n.depth for n in reversed(path) if n.snapshot != NO_SNAPSHOT), 0)

    def has_snapshot(self, tokens: Sequence[int], depth: int) -> bool:
        """Whether tokens[:depth] can be resumed from already."""
        path = self._walk(tokens, depth)
        return bool(path) and path[-1].depth == depth and path[-1].snapshot != NO_SNAPSHOT

    def remember(self, tokens: Sequence[int]) -> None:
        """Add the prompt's whole pages as ghosts, so that what it shares can be discovered."""
        self._extend(tokens, self.aligned(len(tokens) - 1))

    def publish(self, tokens: Sequence[int], pages: Sequence[int], snapshot: int) -> None:
        """Offer tokens (whole pages, all computed) with their pages and the snapshot at their end.

        Takes over the caller's hold of `snapshot`, and a hold of its own on each page.
        """
        node = self._extend(tokens, len(tokens))
        if node is self._root or node.snapshot != NO_SNAPSHOT:
            self._snapshots.drop(snapshot)
            return
        self.version += 1
        node.snapshot = snapshot
        self._recent[node] = None
        self._ghosts.pop(node, None)
        for above in _path(node):
            if above.live == 0:
                above.page = pages[above.depth // self._page_size - 1]
                self._pages.keep(above.page)
            above.live += 1

    def evict(self) -> bool:
        """Give up the snapshot used longest ago, with the pages only it needs. False: none left."""
        if not self._recent:
            return False
        self.version += 1
        node, _ = self._recent.popitem(last=False)
        self._snapshots.drop(node.snapshot)
        node.snapshot = NO_SNAPSHOT
        for above in _path(node):
            above.live -= 1
            if above.live == 0:
                self._pages.evict(above.page)
                above.page = NULL_PAGE
        if not node.children:
            self._ghosts[node] = None
        return True

    def clear(self) -> None:
        """Forget everything."""
        while self.evict():
            pass
        self._root.children.clear()
        self._ghosts.clear()
        self._count = 0

    def aligned(self, length: int) -> int:
        """`length` rounded down to whole pages."""
        return max(0, length) // self._page_size * self._page_size

    @property
    def num_snapshots(self) -> int:
        """Snapshots that the tree holds."""
        return len(self._recent)

    def held_pages(self) -> list[int]:
        """Every page that the tree holds (for integrity checks)."""
        return [node.page for node in self._nodes() if node.page != NULL_PAGE]

    def check(self) -> None:
        """Raise AssertionError where the tree's own rules do not hold."""
        nodes = self._nodes()
        assert len(nodes) == self._count, "node count"
        for node in nodes:
            below = sum(child.live for child in node.children.values())
            assert node.live == below + (node.snapshot != NO_SNAPSHOT), "live count"
            assert (node.page != NULL_PAGE) == (node.live > 0), "ghosts hold no page"
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

    def _walk(self, tokens: Sequence[int], length: int) -> list[Node]:
        path: list[Node] = []
        node = self._root
        size = self._page_size
        for start in range(0, length, size):
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _extend(self, tokens: Sequence[int], length: int) -> Node:
        """The node of tokens[:length], made with its ancestors where missing."""
        path = self._walk(tokens, length)
        node = path[-1] if path else self._root
        for start in range(node.depth, length, self._page_size):
            self._ghosts.pop(node, None)
            key = tuple(tokens[start : start + self._page_size])
            child = Node(parent=node, key=key, depth=start + self._page_size)
            node.children[key] = child
            node = child
            self._count += 1
        if node is not self._root and not node.children and node.snapshot == NO_SNAPSHOT:
            self._ghosts[node] = None
            self._ghosts.move_to_end(node)
        self._trim(keep=node)
        return node

    def _trim(self, keep: Node) -> None:
        """Drop childless ghosts, oldest first, until the tree is within its bound."""
        while self._count > self._max_nodes and self._ghosts:
            node = next(iter(self._ghosts))
            if node is keep:
                break
            del self._ghosts[node]
            parent = node.parent
            assert parent is not None
            del parent.children[node.key]
            self._count -= 1
            if parent.parent and not parent.children and parent.snapshot == NO_SNAPSHOT:
                self._ghosts[parent] = None
                self._ghosts.move_to_end(parent, last=False)


def _path(node: Node) -> list[Node]:
    """The node and its ancestors below the root."""
    path = []
    at: Node | None = node
    while at is not None and at.parent is not None:
        path.append(at)
        at = at.parent
    return path
