"""Slots, pages and snapshots: which request or cached prefix owns what of the device's memory.

It allocates and frees what the scheduler asks for. It does not decide which request runs, waits or
is preempted, nor when the resources of a request may be freed.
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

    def missing_pages(self, request: Request, length: int) -> int:
        """Pages that the request lacks for `length` tokens."""
        return -(-length // self._limits.page_size) - len(request.pages)

    def ensure_free_pages(self, count: int) -> bool:
        """Evict snapshots until `count` pages are free. False, and nothing evicted, if that is not
        possible."""
        if self.pages.free + self.pages.evictable < count:
            return False
        while self.pages.free < count:
            self.tree.evict()
        return True

    def grant(self, request: Request, count: int) -> PageGrant:
        """Allocate `count` more pages for the request; the caller has checked that they are
        free."""
        pages = self.pages.allocate(count)
        granted = PageGrant(request.slot, len(request.pages), pages)
        request.pages.extend(pages)
        return granted

    # --- all resources of a request -----------------------------------------------------------

    def match(self, request: Request) -> Match:
        """The cached prefix of the request's tokens; empty if the request may not use the cache."""
        if not self.may_use_cache(request):
            return _NOTHING
        return self.tree.match(request.tokens, request.source.cache_salt)

    def admit(
        self, request: Request, match: Match, length: int, spare: int
    ) -> list[PageGrant] | None:
        """Allocate a slot (one is free) and the pages for `length` tokens, and share those of the
        match. None, and nothing allocated, if fewer than `spare` pages would stay free."""
        for page in match.pages:
            self.pages.retain(page)
        missing = -(-length // self._limits.page_size) - len(match.pages)
        if not self.ensure_free_pages(missing + spare):
            for page in match.pages:
                self.pages.release(page)
            return None
        request.slot = self.slots.allocate(1)[0]
        request.pages = list(match.pages)
        shared = [PageGrant(request.slot, 0, match.pages)] if match.pages else []
        return [*shared, self.grant(request, missing)]

    def release(self, request: Request) -> None:
        """Free the slot and the pages of the request."""
        for page in request.pages:
            self.pages.release(page)
        request.pages = []
        self.slots.release(request.slot)
        request.slot = 0

    # --- prefixes ---------------------------------------------------------------------------

    def may_use_cache(self, request: Request) -> bool:
        """Whether its prompt may come from the cache: not if it asks for prompt log-
        probabilities."""
        return self._limits.prefix_caching and request.source.params.prompt_logprobs is None

    def estimate_cached_tokens(self, request: Request) -> None:
        """Look up how much of a waiting request's prompt is cached now."""
        request.estimate_version = self.tree.version
        request.cached_estimate = 0
        if self.may_use_cache(request):
            request.cached_estimate = self.tree.cached(request.tokens, request.source.cache_salt)

    def can_gain_from_cache(self, request: Request) -> bool:
        """Whether it could resume from a snapshot of another request with the same prompt."""
        return (
            self._limits.num_snapshots > 0
            and self.may_use_cache(request)
            and self.tree.round_down(request.prompt_len - 1)
            >= max(1, self._limits.snapshot_distance)
        )

    def record_prompt(self, request: Request) -> None:
        """Note the request's prompt, so that later prompts discover what they share with it."""
        self.tree.record_prompt(request.tokens, request.source.cache_salt)

    def boundaries(self, request: Request, shared: int) -> list[int]:
        """Where this prompt's prefill stops for snapshots, nearest last. shared: tokens that an
        earlier prompt began with too.

        Each stop costs a step. So of two that are less than `snapshot_distance` apart only the
        first is cached: a prompt that resumes there computes fewer tokens than that again.
        """
        limits, aligned = self._limits, self.tree.round_down
        if not limits.prefix_caching or limits.num_snapshots == 0:
            return []
        end = aligned(len(request.tokens) - 1)
        wanted = {end, shared, *(aligned(b) for b in request.source.boundaries)}
        if limits.snapshot_interval:
            wanted.update(range(limits.snapshot_interval, end, limits.snapshot_interval))
        cached: list[int] = []
        last = request.computed
        for boundary in sorted(b for b in wanted if request.computed < b <= end):
            if boundary - last >= limits.snapshot_distance:
                cached.append(boundary)
                last = boundary
        return cached[::-1]

    def take_snapshot(self, request: Request, depth: int) -> int | None:
        """Allocate a snapshot for the request's first `depth` tokens. None: there is one already,
        or launched steps write all of them."""
        if self.tree.has_snapshot(request.tokens, depth, request.source.cache_salt):
            return None
        if self.snapshots.free == 0 and not self.tree.evict():
            return None
        return self.snapshots.allocate(1)[0]

    def publish(self, request: Request, depth: int, snapshot: int) -> None:
        """Insert the snapshot of the request's first `depth` tokens, which has been written."""
        pages = request.pages[: depth // self._limits.page_size]
        self.tree.publish(request.tokens[:depth], pages, snapshot, request.source.cache_salt)

    # --- integrity --------------------------------------------------------------------------

    def check(self, owners: Collection[Request], saving: int) -> None:
        """Raise AssertionError unless every page, slot and snapshot is accounted for. owners: the
        requests that have slots and pages. saving: snapshots that launched steps write."""
        self.tree.check()
        cached = self.tree.cached_pages()
        expected = Counter(cached)
        for request in owners:
            expected.update(request.pages)
        for page in range(NULL_PAGE + 1, self._limits.num_pages):
            assert self.pages.ref_count(page) == expected[page], f"reference count of page {page}"
        alone = sum(expected[page] == 1 for page in cached)
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
