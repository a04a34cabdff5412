"""What is held of the device's memory: slots, pages and snapshots, by requests and the prefix tree.

It knows a request as a holder, and gives and takes as it is told. Who runs, who waits and who must
give way is decided elsewhere (scheduler.py), and so is when a request may let go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from millrace.engine.prefix_cache import NO_SNAPSHOT, NULL_PAGE, Match, Pool, PrefixTree
from millrace.engine.request import Request
from millrace.protocol import Limits, PageGrant

_NOTHING = Match(0, [], NO_SNAPSHOT, 0)


class KVManager:
    """The pools of one replica, and the tree of the prompts it has seen."""

    def __init__(self, limits: Limits) -> None:
        self.slots = Pool(limits.max_num_seqs, first=1)
        self.pages = Pool(limits.num_pages - 1, first=NULL_PAGE + 1)
        self.snapshots = Pool(limits.num_snapshots)
        self.tree = PrefixTree(limits.page_size, self.pages, self.snapshots)
        self._limits = limits

    # --- pages ------------------------------------------------------------------------------

    def missing(self, request: Request, length: int) -> int:
        """Pages that the request needs for `length` tokens beyond those it has."""
        return -(-length // self._limits.page_size) - len(request.pages)

    def free_pages(self, count: int) -> bool:
        """Make `count` pages free, at the cost of snapshots if need be; of none if in vain."""
        if self.pages.free + self.pages.evictable < count:
            return False
        while self.pages.free < count:
            self.tree.evict()
        return True

    def grant(self, request: Request, count: int) -> PageGrant:
        """`count` more pages, which are free, for the request."""
        pages = self.pages.take(count)
        granted = PageGrant(request.slot, len(request.pages), pages)
        request.pages.extend(pages)
        return granted

    # --- a request's whole share ------------------------------------------------------------

    def match(self, request: Request) -> Match:
        """What of the request's tokens need not be computed; nothing if it may not be reused."""
        return self.tree.match(request.tokens) if self.caches(request) else _NOTHING

    def admit(
        self, request: Request, match: Match, length: int, spare: int
    ) -> list[PageGrant] | None:
        """Give a request a slot (one is free) and pages for `length` tokens, those of the match
        among them. None: they are not there with `spare` more, and nothing has been given."""
        for page in match.pages:
            self.pages.hold(page)
        missing = -(-length // self._limits.page_size) - len(match.pages)
        if not self.free_pages(missing + spare):
            for page in match.pages:
                self.pages.drop(page)
            return None
        request.slot = self.slots.take(1)[0]
        request.pages = list(match.pages)
        shared = [PageGrant(request.slot, 0, match.pages)] if match.pages else []
        return [*shared, self.grant(request, missing)]

    def release(self, request: Request) -> None:
        """Take back all that the request holds."""
        for page in request.pages:
            self.pages.drop(page)
        request.pages = []
        self.slots.drop(request.slot)
        request.slot = 0

    # --- prefixes ---------------------------------------------------------------------------

    def caches(self, request: Request) -> bool:
        """Whether its prompt may come from the cache: not if every position's logits are wanted."""
        return self._limits.prefix_caching and request.source.params.prompt_logprobs is None

    def estimate_cached(self, request: Request) -> None:
        """Look up how much of a waiting request's prompt the prefix cache has by now."""
        request.estimate_version = self.tree.version
        request.cached_estimate = self.tree.cached(request.tokens) if self.caches(request) else 0

    def will_cache(self, request: Request) -> bool:
        """Whether another request's snapshots could save it some of its prompt."""
        return (
            self._limits.num_snapshots > 0
            and self.caches(request)
            and self.tree.aligned(request.prompt_len - 1) >= max(1, self._limits.snapshot_distance)
        )

    def boundaries(self, request: Request, shared: int) -> list[int]:
        """Where this prompt's prefill stops for snapshots, nearest last. shared: tokens that an
        earlier prompt began with too.

        Each stop costs a step. So of two that are less than `snapshot_distance` apart only the
        first is kept: a prompt that resumes there computes fewer tokens than that again.
        """
        limits, aligned = self._limits, self.tree.aligned
        if not limits.prefix_caching or limits.num_snapshots == 0:
            return []
        end = aligned(len(request.tokens) - 1)
        wanted = {end, shared, *(aligned(b) for b in request.source.boundaries)}
        if limits.snapshot_interval:
            wanted.update(range(limits.snapshot_interval, end, limits.snapshot_interval))
        kept: list[int] = []
        last = request.computed
        for boundary in sorted(b for b in wanted if request.computed < b <= end):
            if boundary - last >= limits.snapshot_distance:
                kept.append(boundary)
                last = boundary
        return kept[::-1]

    def take_snapshot(self, request: Request, depth: int) -> int | None:
        """A snapshot to save the request's first `depth` tokens in; None: there is one already, or
        every snapshot is about to be written by a launched step."""
        if self.tree.has_snapshot(request.tokens, depth):
            return None
        if self.snapshots.free == 0 and not self.tree.evict():
            return None
        return self.snapshots.take(1)[0]

    def publish(self, request: Request, depth: int, snapshot: int) -> None:
        """The snapshot of the request's first `depth` tokens has been written."""
        pages = request.pages[: depth // self._limits.page_size]
        self.tree.publish(request.tokens[:depth], pages, snapshot)

    # --- integrity --------------------------------------------------------------------------

    def check(self, owners: Collection[Request], saving: int) -> None:
        """Raise AssertionError unless every page, slot and snapshot is accounted for. owners: who
        holds slots and pages. saving: snapshots that launched steps write."""
        self.tree.check()
        kept = self.tree.held_pages()
        held = Counter(kept)
        for request in owners:
            held.update(request.pages)
        for page in range(NULL_PAGE + 1, self._limits.num_pages):
            assert self.pages.holders(page) == held[page], f"holders of page {page}"
        alone = sum(held[page] == 1 for page in kept)
        assert self.pages.evictable == alone, "pages that only the prefix cache holds"
        slots = [request.slot for request in owners]
        assert len(set(slots)) == len(slots) == self.slots.size - self.slots.free, "slots"
        assert self.tree.num_snapshots + saving == self.snapshots.size - self.snapshots.free, (
            "snapshots"
        )
        for request in owners:
            covered = len(request.pages) * self._limits.page_size
            needed = min(request.computed, request.max_total)
            assert covered >= needed, "pages cover what was computed"
