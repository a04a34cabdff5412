"""The cache policy of models with nothing but attention: prompts resume at any whole page.

Keys and values are all that such a model needs, so whatever has been computed is cached as it is:
prompts, and what was generated, too. Nothing is saved on purpose, and no step is cut for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from millrace.engine.cache.policy import NO_SNAPSHOT, Difference, Kind, Match
from millrace.engine.cache.pool import Pool
from millrace.engine.cache.tree import (
    Node,
    ancestors,
    descendants,
    difference,
    packed,
    page_key,
    root_node,
    round_down,
    walk,
)


class PageTree:
    """A `CachePolicy`: a radix tree of computed tokens, each node with its page.

    pages: the pool that it takes references from; so there are never more nodes than pages.
    """

    def __init__(self, page_size: int, pages: Pool) -> None:
        self._page_size = page_size
        self._pages = pages
        self.version = 0
        self.now = 0.0
        self.lower_tiers = False
        self.evicted_tags: list[int] = []
        self._root = root_node()
        # Used longest ago first. A use of a node is one of its ancestors, which come after it; so
        # the first node has no children.
        self._recent: OrderedDict[Node, None] = OrderedDict()

    @property
    def snapshots(self) -> tuple[int, int]:
        return 0, 0

    # --- lookup -----------------------------------------------------------------------------

    def match(self, tokens: Sequence[int], salt: str = "") -> Match:
        path = self._walk(tokens, len(tokens) - 1, salt)
        self._use(path)
        found = path[-1].depth if path else 0
        return Match(found, [node.page for node in path], NO_SNAPSHOT, shared=found)

    def cached(self, tokens: Sequence[int], salt: str = "") -> int:
        path = self._walk(tokens, len(tokens) - 1, salt)
        return path[-1].depth if path else 0

    def locate(self, tokens: Sequence[int], salt: str = "") -> Match | None:
        """Of whole pages."""
        path = self._walk(tokens, len(tokens), salt)
        if not path or path[-1].depth != len(tokens):
            return None
        pages = [node.page for node in path]
        return Match(len(tokens), pages, NO_SNAPSHOT, shared=len(tokens))

    def pages_of(self, tokens: Sequence[int], salt: str = "") -> list[int]:
        return [node.page for node in self._walk(tokens, len(tokens), salt)]

    def compare(self, tokens: Sequence[int], salt: str = "") -> Difference:
        path = self._walk(tokens, round_down(len(tokens), self._page_size), salt)
        return difference(self._root, path, tokens, self._page_size, salt)

    def can_resume(self, length: int) -> bool:
        return length > self._page_size

    # --- insertion --------------------------------------------------------------------------

    def record_prompt(self, tokens: Sequence[int], salt: str = "") -> None:
        """Nothing: what two prompts share is cached anyway."""

    def stops(
        self,
        start: int,
        length: int,
        ends: Iterable[int],
        shared: int,
        resumed: Kind | None = None,
    ) -> list[int]:
        return []

    def begin_save(
        self, tokens: Sequence[int], salt: str = "", *, kind: Kind = Kind.PROMPT
    ) -> int | None:
        return None

    def can_save(self) -> bool:
        return True

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
        raise RuntimeError("a cache of pages has no snapshots to publish")

    def store(self, tokens: Sequence[int], pages: Sequence[int], salt: str = "") -> None:
        """Where a page of the same tokens is cached already, that one stays."""
        path = self._walk(tokens, len(tokens), salt)
        node = path[-1] if path else self._root
        data = packed(tokens)
        for start in range(node.depth, round_down(len(tokens), self._page_size), self._page_size):
            key = page_key(data, start, start + self._page_size, salt)
            page = pages[start // self._page_size]
            child = Node(parent=node, key=key, depth=start + self._page_size, page=page)
            node.children[key] = child
            self._pages.retain_cached(page)
            self.version += 1
            node = child
            path.append(node)
        self._use(path)

    def written(self, tokens: Sequence[int], stops: Sequence[int], salt: str = "") -> int:
        return round_down(len(tokens), self._page_size)

    def pin(self, tokens: Sequence[int], seconds: tuple[float, float], salt: str = "") -> None:
        """Nothing: what was used last goes last."""

    # --- use --------------------------------------------------------------------------------

    def retain(self, snapshot: int) -> None:
        raise AssertionError("pages are all that a prompt resumes from")

    def release(self, snapshot: int) -> None:
        raise AssertionError("pages are all that a prompt resumes from")

    # --- removal ----------------------------------------------------------------------------

    def evict(self) -> bool:
        """Give up the page that was used longest ago, of those without pages behind them. If a
        request uses it, it is not free yet; the request stores it again when it ends."""
        if not self._recent:
            return False
        self.version += 1
        node, _ = self._recent.popitem(last=False)
        assert node.parent is not None
        del node.parent.children[node.key]
        self._pages.release_cached(node.page)
        return True

    def clear(self) -> None:
        while self.evict():
            pass

    # --- integrity --------------------------------------------------------------------------

    def cached_pages(self) -> list[int]:
        return [node.page for node in descendants(self._root)]

    def check(self, saving: int = 0) -> None:
        nodes = descendants(self._root)
        assert set(nodes) == set(self._recent), "nodes in order of use"
        assert len({node.page for node in nodes}) == len(nodes), "a page is one node's"
        place = {node: i for i, node in enumerate(self._recent)}
        for node in nodes:
            above = ancestors(node)[1:]
            assert all(place[one] > place[node] for one in above), "ancestors are used later"

    # --- nodes ------------------------------------------------------------------------------

    def _walk(self, tokens: Sequence[int], length: int, salt: str) -> list[Node]:
        whole = round_down(length, self._page_size)
        return walk(self._root, tokens, whole, self._page_size, salt)

    def _use(self, path: list[Node]) -> None:
        for node in reversed(path):
            self._recent[node] = None
            self._recent.move_to_end(node)
