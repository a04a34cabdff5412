"""The cache policy of hybrid models: prompts resume at snapshots.

A hybrid model can resume a prompt only where its recurrent state was saved. So a *snapshot* makes a
prefix reusable, together with the KV pages on the path to it. Hence the rule of the tree: a node
(one page of tokens) owns its page only while a snapshot is at the node or below it. A node without
one is a *ghost*: it keeps the tokens only, so that the next prompt can discover how far two prompts
are the same (a junction). It costs no device memory. To evict a snapshot turns the part of its path
that no other snapshot needs into ghosts.

Snapshots of prompts lie at the ends of pages. The snapshot of an answer lies where the answer
ended, so its last page may be unfinished: that is a *tail*. A request that resumes there gets a
copy of that page, because it goes on writing in it.

What is evicted is what is worth least (`worth.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from millrace.engine.cache.policy import NO_SNAPSHOT, Difference, Kind, Match
from millrace.engine.cache.pool import NULL_PAGE, Pool
from millrace.engine.cache.tree import (
    Lost,
    Node,
    Rates,
    ancestors,
    begins_with,
    descendants,
    difference,
    packed,
    page_key,
    pages_of,
    root_node,
    round_down,
    walk,
)
from millrace.engine.cache.worth import Worth, alike_node

SHORT_TURN = 16  # distances: fewer tokens behind an answer are computed without a stop
RANK_SHARE = 16  # of many snapshots one in so many is ranked for eviction at a time


class SnapshotTree:
    """A `CachePolicy`: a radix tree of prompts, one node a page of tokens, with snapshots.

    pages: the pool that it takes references from. interval: snapshots at its multiples too; 0: none
    of these. distance: the least between the snapshots of one prompt. page_cost: memory of a page
    as a share of a snapshot's. now: seconds. At most `max_nodes` nodes, but the path of the newest
    prompt stays whole.
    """

    def __init__(
        self,
        page_size: int,
        pages: Pool,
        num_snapshots: int,
        *,
        interval: int = 0,
        distance: int = 0,
        page_cost: float = 0.0,
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
        self.now = 0.0
        self.lower_tiers = False  # whether what is evicted comes back from one
        self.evicted_tags: list[int] = []
        self._order = 0
        self._cached: dict[Node, None] = {}  # nodes with a snapshot
        self._worth = Worth(page_size, page_cost)
        self._ranked: dict[bool, list[tuple[Node, float]]] = {True: [], False: []}
        self._ghosts: OrderedDict[Node, None] = OrderedDict()  # childless ghosts, oldest first

    @property
    def snapshots(self) -> tuple[int, int]:
        return self._snapshots.size - self._snapshots.free, self._snapshots.size

    # --- lookup -----------------------------------------------------------------------------

    def match(self, tokens: Sequence[int], salt: str = "") -> Match:
        """The longest prefix to resume from; never the whole prompt: at least one token is left."""
        path = self._walk(tokens, self._round_down(len(tokens) - 1), salt)
        shared = path[-1].depth if path else 0
        whole, path = path, self._resumable(path, tokens, salt)
        self._miss(whole[len(path) :])
        if not path:
            return Match(0, [], NO_SNAPSHOT, shared)
        self._use(path)
        last = path[-1]
        return Match(last.depth, [n.page for n in path], last.snapshot, shared, last.kind)

    def cached(self, tokens: Sequence[int], salt: str = "") -> int:
        """How many tokens `match` would find now. It does not count as a use of them."""
        path = self._walk(tokens, self._round_down(len(tokens) - 1), salt)
        path = self._resumable(path, tokens, salt)
        return path[-1].depth if path else 0

    def locate(self, tokens: Sequence[int], salt: str = "") -> Match | None:
        path = self._walk(tokens, len(tokens), salt)
        if not path or path[-1].depth != len(tokens) or path[-1].snapshot == NO_SNAPSHOT:
            return None
        found = path[-1].snapshot
        return Match(len(tokens), [node.page for node in path], found, len(tokens))

    def pages_of(self, tokens: Sequence[int], salt: str = "") -> list[int]:
        path = self._walk(tokens, self._round_down(len(tokens)), salt)
        return [node.page for node in path if node.page != NULL_PAGE]

    def has(self, tokens: Sequence[int], salt: str = "") -> bool:
        """Whether there is a snapshot of exactly these tokens."""
        return self.locate(tokens, salt) is not None

    def compare(self, tokens: Sequence[int], salt: str = "") -> Difference:
        path = self._walk(tokens, round_down(len(tokens), self._page_size), salt)
        return difference(self._root, path, tokens, self._page_size, salt)

    def can_resume(self, length: int) -> bool:
        return self._snapshots.size > 0 and (self._round_down(length - 1) >= max(1, self._distance))

    # --- insertion --------------------------------------------------------------------------

    def record_prompt(self, tokens: Sequence[int], salt: str = "") -> None:
        """Add the full pages of a prompt as ghosts, so that later prompts discover what they
        share."""
        self._extend(tokens, self._round_down(len(tokens) - 1), salt)

    def stops(
        self,
        start: int,
        length: int,
        ends: Iterable[int],
        shared: int,
        resumed: Kind | None = None,
    ) -> list[int]:
        """At the ends of chat turns, at the end, at junctions, and at fixed distances.

        Each stop costs a step. So of two that are less than `distance` apart only the first is
        cached: a prompt that resumes there computes fewer tokens than that again. A prompt that
        resumes at an answer is likely to be continued at its own answer; so a short turn stops
        nowhere: its first token would come a step later.
        """
        if not self._snapshots.size:
            return []
        end = self._round_down(length - 1)
        wanted = {shared}
        if resumed is not Kind.ANSWER or length - start >= SHORT_TURN * self._distance:
            wanted |= {end, *(self._round_down(turn) for turn in ends)}
        if self._interval:
            wanted.update(range(self._interval, end, self._interval))
        cached: list[int] = []
        last = start
        for boundary in sorted(b for b in wanted if start < b <= end):
            if boundary - last >= self._distance:
                cached.append(boundary)
                last = boundary
        return cached[::-1]

    def begin_save(
        self, tokens: Sequence[int], salt: str = "", *, kind: Kind = Kind.PROMPT
    ) -> int | None:
        if self.has(tokens, salt):
            return None
        if kind is Kind.ANSWER and self._snapshots.free == 0:
            return self._save_answer(tokens, salt)
        return self._free_snapshot()

    def can_save(self) -> bool:
        in_use = (self._snapshots.ref_count(node.snapshot) > 1 for node in self._cached)
        return self._snapshots.free > 0 or not all(in_use)

    def _free_snapshot(self) -> int | None:
        """A free snapshot, if need be in place of the one that is worth least."""
        while self._snapshots.free == 0:
            if not self._evict(for_pages=False):
                return None
        return self._snapshots.allocate(1)[0]

    def _save_answer(self, tokens: Sequence[int], salt: str) -> int | None:
        """A snapshot for an answer, not in place of the one that its prompt has just got, nor of
        one that is worth more, unless that comes back from a lower tier."""
        path = self._walk(tokens, self._round_down(len(tokens)), salt)
        over = self._resumable(path, tokens, salt)
        if over:
            self._snapshots.retain(over[-1].snapshot)
        saved = len(tokens) - (over[-1].depth if over else 0)
        rates = alike_node(path).rates if path else None
        found = None
        if self.lower_tiers or self._deserves(saved, rates):
            found = self._free_snapshot()
        if over:
            self._snapshots.release(over[-1].snapshot)
        return found

    def publish(
        self,
        tokens: Sequence[int],
        pages: Sequence[int],
        snapshot: int,
        salt: str = "",
        *,
        kind: Kind = Kind.PROMPT,
        tag: int = 0,
    ) -> None:
        """Adds a reference to each page, the last of which may be unfinished. If there is a
        snapshot already, `snapshot` is freed."""
        node = self._extend(tokens, len(tokens), salt)
        if node is self._root or node.snapshot != NO_SNAPSHOT:
            self._snapshots.release(snapshot)
            return
        self.version += 1
        node.snapshot, node.salt, node.tag = snapshot, salt, tag
        node.kind = kind
        self._cached[node] = None
        self._ghosts.pop(node, None)
        path = ancestors(node)
        self._link(node, path, tokens, salt)
        self._worth.added(node, path[::-1])
        self._touch(node)
        for ancestor in path:
            if ancestor.snapshots_below == 0:
                ancestor.page = pages[pages_of(ancestor.depth, self._page_size) - 1]
                self._pages.retain_cached(ancestor.page)
            ancestor.snapshots_below += 1

    def store(self, tokens: Sequence[int], pages: Sequence[int], salt: str = "") -> None:
        """Nothing: without a snapshot no page can be used."""

    def written(self, tokens: Sequence[int], stops: Sequence[int], salt: str = "") -> int:
        if not self._snapshots.size:
            return 0
        path = self._walk(tokens, self._round_down(len(tokens)), salt)
        over = self._resumable(path, tokens, salt)
        saved = len(tokens) - (over[-1].depth if over else 0)
        kept = self._snapshots.free > 0 or self.lower_tiers
        if kept or self._deserves(saved, alike_node(path).rates if path else None):
            return len(tokens)
        return max(stops, default=0)

    def pin(self, tokens: Sequence[int], seconds: tuple[float, float], salt: str = "") -> None:
        path = self._resumable(self._walk(tokens, len(tokens), salt), tokens, salt)
        ends = [node for node in path if node in self._cached]
        for node, duration in zip((ends[0], ends[-1]) if ends else (), seconds, strict=False):
            until = self.now + duration
            if duration and (self._is_pinned(node) or self._may_pin()):
                node.pinned_until = max(node.pinned_until, until)

    def _is_pinned(self, node: Node) -> bool:
        return node.pinned_until > self.now

    def _may_pin(self) -> bool:
        return sum(map(self._is_pinned, self._cached)) < self._snapshots.size // 2

    # --- use --------------------------------------------------------------------------------

    def retain(self, snapshot: int) -> None:
        self._snapshots.retain(snapshot)

    def release(self, snapshot: int) -> None:
        self._snapshots.release(snapshot)

    # --- removal ----------------------------------------------------------------------------

    def evict(self) -> bool:
        """Free the snapshot whose pages are worth least, and these pages. False: none is left."""
        return self._evict(for_pages=True)

    def _evict(self, for_pages: bool) -> bool:
        node = self._least(for_pages)
        if node is None:
            return False
        self._drop(node)
        return True

    def _drop(self, node: Node) -> None:
        """Free a node's snapshot and the pages that only it needs."""
        self.version += 1
        del self._cached[node]
        self._worth.removed(node)
        if node.above is not None and node.above is not self._root and not node.below:
            node.above.uses = max(node.above.uses, node.uses)  # its conversation resumes there now
        if not node.below and node.tag:
            self.evicted_tags.append(node.tag)
        self._unlink(node)
        self._snapshots.release(node.snapshot)
        self._record_loss(node)
        node.snapshot, node.uses, node.branches, node.pinned_until = NO_SNAPSHOT, 0, 0, 0.0
        for ancestor in ancestors(node):
            ancestor.snapshots_below -= 1
            if ancestor.snapshots_below == 0:
                self._pages.release_cached(ancestor.page)
                ancestor.page = NULL_PAGE
        if node.depth % self._page_size:
            self._remove(node)  # the tokens of a tail help nobody to find a junction
        elif not node.children:
            self._ghosts[node] = None

    def _record_loss(self, node: Node) -> None:
        """Note that a node had a snapshot; for a tail, at its parent."""
        home = node.parent if node.depth % self._page_size else node
        if home is not None and home is not self._root:
            assert node.alike is not None
            home.lost = Lost(node.kind, node.uses, node.returned, node.alike)

    def _deserves(self, saved: int, rates: Rates | None) -> bool:
        """Whether a new answer's snapshot is worth more than what it would take the place of."""
        victim = self._least(for_pages=False)
        if victim is None:
            return False
        least = self._worth.of(victim, self.now, for_pages=False)
        return self._worth.of_new_answer(saved, rates) > least

    def _least(self, for_pages: bool) -> Node | None:
        """The node to evict next. Of many, those that are worth least are ranked once; one that has
        been evicted, or is worth more by now, is passed over.

        for_pages: of those that have pages of their own.
        """
        ranked = self._ranked[for_pages]
        while ranked:
            node, worth = ranked.pop()
            if node not in self._cached or not self._frees(node, for_pages):
                continue
            if self._worth.of(node, self.now, for_pages) <= worth:
                return node
        found = [node for node in self._cached if self._frees(node, for_pages)]
        if not found and for_pages:
            found = [node for node in self._cached if not node.below]
        if not found:
            return None
        keys = {node: (self._worth.of(node, self.now, for_pages), node.order) for node in found}
        count = len(found) // RANK_SHARE
        if count < 2:
            return min(found, key=keys.__getitem__)
        least = sorted(found, key=keys.__getitem__)[:count]
        ranked += ((node, keys[node][0]) for node in reversed(least))
        return ranked.pop()[0]

    def _frees(self, node: Node, for_pages: bool) -> bool:
        """Whether to evict it frees its snapshot, which nothing uses, and pages if these count."""
        in_use = self._snapshots.ref_count(node.snapshot) > 1
        return not in_use and not (for_pages and node.below)

    def clear(self) -> None:
        """Remove every node, snapshot and page."""
        for node in list(self._cached):
            self._drop(node)
        self._root.children.clear()
        self._ghosts.clear()
        self._num_nodes = 0

    # --- integrity --------------------------------------------------------------------------

    def cached_pages(self) -> list[int]:
        return [node.page for node in descendants(self._root) if node.page != NULL_PAGE]

    def check(self, saving: int = 0) -> None:
        nodes = descendants(self._root)
        used, _ = self.snapshots
        held = sum(self._snapshots.ref_count(node.snapshot) > 1 for node in self._cached)
        assert len(self._cached) <= used <= len(self._cached) + saving, "snapshots"
        assert self._worth.total == len(self._cached), "worth"
        assert held <= saving, "snapshots in use"
        assert len(nodes) == self._num_nodes, "node count"
        for node in nodes:
            below = sum(child.snapshots_below for child in node.children.values())
            assert node.snapshots_below == below + (node.snapshot != NO_SNAPSHOT), (
                "snapshots_below count"
            )
            assert (node.page != NULL_PAGE) == (node.snapshots_below > 0), "ghosts have no page"
            assert (node in self._cached) == (node.snapshot != NO_SNAPSHOT), "snapshots"
            if node in self._cached:
                over = [o for o in self._cached if o is not node and begins_with(node, o)]
                above = max(over, key=lambda o: o.depth, default=self._root)
                assert node.above is above, "the snapshot above"
                assert node in above.below, "the snapshots below"
            tails = [child for child in node.children.values() if child.depth % self._page_size]
            assert node.tails == len(tails), "tails"
            assert all(tail.snapshot != NO_SNAPSHOT for tail in tails), "tails have snapshots"
            ghost_leaf = not node.children and node.snapshot == NO_SNAPSHOT
            assert (node in self._ghosts) == ghost_leaf, "ghost order"

    # --- use and order ----------------------------------------------------------------------

    def _touch(self, node: Node) -> None:
        self._order += 1
        node.order, node.used_at = self._order, self.now

    def _use(self, path: list[Node]) -> None:
        """A prompt resumes at the end of the path."""
        for node in path:
            if node in self._cached:
                self._touch(node)
        self._worth.used(path[-1])

    def _miss(self, beyond: list[Node]) -> None:
        """A prompt is the same as earlier ones up to nodes beyond where it can resume."""
        lost = next((node.lost for node in reversed(beyond) if node.lost is not None), None)
        if lost is not None:
            self._worth.missed(lost)

    def _link(self, node: Node, path: list[Node], tokens: Sequence[int], salt: str) -> None:
        """Set what is above and below a new snapshot. path: it and its ancestors; tokens: its."""
        over = self._resumable(path[:0:-1], tokens, salt)
        above = over[-1] if over else self._root
        beside = node.parent if node.depth % self._page_size else node
        assert beside is not None
        # Rarely; to look at all that is below `above` takes long.
        if beside is self._root or beside.snapshots_below:
            for other in [o for o in above.below if begins_with(o, node)]:
                del above.below[other]
                other.above, node.below[other] = node, None
        node.above, above.below[node] = above, None
        if node.kind is Kind.TURNS and above.above is not None and above.above is not self._root:
            node.uses, above.branches = above.branches, 0
        if node.kind is Kind.ANSWER:
            self._take_over_uses(node, path)

    def _take_over_uses(self, node: Node, path: list[Node]) -> None:
        """The end of a turn has the uses of the turn before, evicted or not."""
        lost = next((a.lost for a in path[1:] if a.lost is not None), None)
        if lost is not None:
            node.uses, lost.uses = lost.uses, 0
        above = node.above
        while above is not None and not above.uses:
            above = above.above
        if above is not None:
            node.uses, above.uses = max(node.uses, above.uses), 0

    def _unlink(self, node: Node) -> None:
        above = node.above
        assert above is not None
        del above.below[node]
        for other in node.below:
            other.above, above.below[other] = above, None
        node.above, node.below = None, {}

    # --- nodes ------------------------------------------------------------------------------

    def _round_down(self, length: int) -> int:
        return round_down(length, self._page_size)

    def _walk(self, tokens: Sequence[int], length: int, salt: str) -> list[Node]:
        return walk(self._root, tokens, length, self._page_size, salt)

    def _resumable(self, path: list[Node], tokens: Sequence[int], salt: str) -> list[Node]:
        """The path, whole pages of a prompt, up to its last node with a snapshot, or to a tail."""
        for at in range(len(path), -1, -1):
            node = path[at - 1] if at else self._root
            if (tail := self._tail(node, tokens, salt)) is not None:
                return [*path[:at], tail]
            if node.snapshot != NO_SNAPSHOT:
                return path[:at]
        return []

    def _tail(self, node: Node, tokens: Sequence[int], salt: str) -> Node | None:
        """The longest tail of a node that the tokens go on with, and beyond."""
        if not node.tails:
            return None
        start = node.depth
        data = packed(tokens[start : start + self._page_size])
        for count in range(min(self._page_size, len(tokens) - start) - 1, 0, -1):
            key = page_key(data, 0, count, "" if start else salt)
            found = node.children.get(key)
            if found is not None:
                return found
        return None

    def _extend(self, tokens: Sequence[int], length: int, salt: str) -> Node:
        """The node of tokens[:length]; missing nodes on the path are created."""
        path = self._walk(tokens, length, salt)
        node = path[-1] if path else self._root
        data = packed(tokens[:length])
        for start in range(node.depth, length, self._page_size):
            self._ghosts.pop(node, None)
            key = page_key(data, start, start + self._page_size, salt)
            child = Node(parent=node, key=key, depth=min(start + self._page_size, length))
            node.children[key] = child
            node.tails += child.depth - start < self._page_size
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
            self._remove(node)

    def _remove(self, node: Node) -> None:
        """Take a node without children and snapshot out of the tree."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        parent.tails -= node.depth % self._page_size > 0
        self._num_nodes -= 1
        if parent.parent and not parent.children and parent.snapshot == NO_SNAPSHOT:
            self._ghosts[parent] = None
            self._ghosts.move_to_end(parent, last=False)
