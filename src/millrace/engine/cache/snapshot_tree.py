"""The cache policy of hybrid models: prompts resume at snapshots.

A hybrid model can resume a prompt only where its recurrent state was saved. So a *snapshot* makes a
prefix reusable, together with the KV pages on the path to it. Hence the rule of the tree: a node
(one page of tokens) owns its page only while a snapshot is at the node or below it. A node without
one is a *ghost*: it keeps the tokens only, so that the next prompt can discover how far two prompts
are the same (a junction). It costs no device memory. To evict a snapshot turns the part of its path
that no other snapshot needs into ghosts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from millrace.engine.cache.policy import NO_SNAPSHOT, Match
from millrace.engine.cache.pool import NULL_PAGE, Pool
from millrace.engine.cache.tree import (
    Node,
    ancestors,
    descendants,
    page_key,
    root_node,
    round_down,
    walk,
)


class SnapshotTree:
    """A `CachePolicy`: a radix tree of prompts, one node a page of tokens, with snapshots.

    pages: the pool that it takes references from. interval: snapshots at its multiples too; 0: none
    of these. distance: the least between the snapshots of one prompt. At most `max_nodes` nodes,
    but the path of the newest prompt stays whole.
    """

    def __init__(
        self,
        page_size: int,
        pages: Pool,
        num_snapshots: int,
        *,
        interval: int = 0,
        distance: int = 0,
        max_nodes: int = 1 << 16,
    ) -> None:
        self._page_size = page_size
        self._pages = pages
        self._snapshots = Pool(num_snapshots)
        self._interval = interval
        self._distance = distance
        self._max_nodes = max_nodes
        self.version = 0
        self._root = root_node()
        self._num_nodes = 0
        self._recent: OrderedDict[Node, None] = OrderedDict()  # nodes with a snapshot, oldest first
        self._ghosts: OrderedDict[Node, None] = OrderedDict()  # childless ghosts, oldest first

    @property
    def snapshots(self) -> tuple[int, int]:
        return self._snapshots.size - self._snapshots.free, self._snapshots.size

    # --- lookup -----------------------------------------------------------------------------

    def match(self, tokens: Sequence[int], salt: str = "") -> Match:
        """The longest prefix to resume from; never the whole prompt: at least one token is left."""
        path = self._walk(tokens, self._round_down(len(tokens) - 1), salt)
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
        path = self._walk(tokens, self._round_down(len(tokens) - 1), salt)
        return next((n.depth for n in reversed(path) if n.snapshot != NO_SNAPSHOT), 0)

    def can_resume(self, length: int) -> bool:
        return self._snapshots.size > 0 and (self._round_down(length - 1) >= max(1, self._distance))

    # --- insertion --------------------------------------------------------------------------

    def record_prompt(self, tokens: Sequence[int], salt: str = "") -> None:
        """Add the full pages of a prompt as ghosts, so that later prompts discover what they
        share."""
        self._extend(tokens, self._round_down(len(tokens) - 1), salt)

    def stops(self, start: int, length: int, ends: Iterable[int], shared: int) -> list[int]:
        """At the ends of chat turns, at the end, at junctions, and at fixed distances.

        Each stop costs a step. So of two that are less than `distance` apart only the first is
        cached: a prompt that resumes there computes fewer tokens than that again.
        """
        if not self._snapshots.size:
            return []
        end = self._round_down(length - 1)
        wanted = {end, shared, *(self._round_down(turn) for turn in ends)}
        if self._interval:
            wanted.update(range(self._interval, end, self._interval))
        cached: list[int] = []
        last = start
        for boundary in sorted(b for b in wanted if start < b <= end):
            if boundary - last >= self._distance:
                cached.append(boundary)
                last = boundary
        return cached[::-1]

    def begin_save(self, tokens: Sequence[int], salt: str = "") -> int | None:
        path = self._walk(tokens, len(tokens), salt)
        found = bool(path) and path[-1].depth == len(tokens) and path[-1].snapshot != NO_SNAPSHOT
        if found or (self._snapshots.free == 0 and not self.evict()):
            return None
        return self._snapshots.allocate(1)[0]

    def publish(
        self, tokens: Sequence[int], pages: Sequence[int], snapshot: int, salt: str = ""
    ) -> None:
        """Adds a reference to each page. If there is a snapshot already, `snapshot` is freed."""
        node = self._extend(tokens, len(tokens), salt)
        if node is self._root or node.snapshot != NO_SNAPSHOT:
            self._snapshots.release(snapshot)
            return
        self.version += 1
        node.snapshot = snapshot
        self._recent[node] = None
        self._ghosts.pop(node, None)
        for ancestor in ancestors(node):
            if ancestor.snapshots_below == 0:
                ancestor.page = pages[ancestor.depth // self._page_size - 1]
                self._pages.retain_cached(ancestor.page)
            ancestor.snapshots_below += 1

    def store(self, tokens: Sequence[int], pages: Sequence[int], salt: str = "") -> None:
        """Nothing: without a snapshot no page can be used."""

    # --- removal ----------------------------------------------------------------------------

    def evict(self) -> bool:
        """Free the least recently used snapshot and the pages that only it needs. False: none
        left."""
        if not self._recent:
            return False
        self.version += 1
        node, _ = self._recent.popitem(last=False)
        self._snapshots.release(node.snapshot)
        node.snapshot = NO_SNAPSHOT
        for ancestor in ancestors(node):
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

    # --- integrity --------------------------------------------------------------------------

    def cached_pages(self) -> list[int]:
        return [node.page for node in descendants(self._root) if node.page != NULL_PAGE]

    def check(self, saving: int = 0) -> None:
        nodes = descendants(self._root)
        used, _ = self.snapshots
        assert len(self._recent) + saving == used, "snapshots"
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

    # --- nodes ------------------------------------------------------------------------------

    def _round_down(self, length: int) -> int:
        return round_down(length, self._page_size)

    def _walk(self, tokens: Sequence[int], length: int, salt: str) -> list[Node]:
        return walk(self._root, tokens, length, self._page_size, salt)

    def _extend(self, tokens: Sequence[int], length: int, salt: str) -> Node:
        """The node of tokens[:length]; missing nodes on the path are created."""
        path = self._walk(tokens, length, salt)
        node = path[-1] if path else self._root
        for start in range(node.depth, length, self._page_size):
            self._ghosts.pop(node, None)
            key = page_key(tokens, start, self._page_size, salt)
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
