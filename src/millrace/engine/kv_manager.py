"""Slots, pages and snapshots: which request or cached prefix owns what of the device's memory.

It allocates and frees what the scheduler asks for. It does not decide which request runs, waits or
is preempted, nor when the resources of a request may be freed. What is cached, and what is given up
for pages, is decided by the cache policy (`engine/cache/policy.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from millrace.engine.cache.page_tree import PageTree
from millrace.engine.cache.policy import NO_SNAPSHOT, CachePolicy, Match
from millrace.engine.cache.pool import NULL_PAGE, Pool
from millrace.engine.cache.snapshot_tree import SnapshotTree
from millrace.engine.request import Request
from millrace.protocol import Limits, PageGrant

_NOTHING = Match(0, [], NO_SNAPSHOT, 0)


def cache_policy(limits: Limits, pages: Pool) -> CachePolicy:
    """The policy that the limits name."""
    if limits.cache_policy == "page":
        return PageTree(limits.page_size, pages)
    return SnapshotTree(
        limits.page_size,
        pages,
        limits.num_snapshots,
        interval=limits.snapshot_interval,
        distance=limits.snapshot_distance,
    )


class KVManager:
    """The pools of one replica, and the policy that keeps the prefixes it has seen."""

    def __init__(self, limits: Limits) -> None:
        self.slots = Pool(limits.max_num_seqs, first=1)
        self.pages = Pool(limits.num_pages - 1, first=NULL_PAGE + 1)
        self.policy = cache_policy(limits, self.pages)
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
            self.policy.evict()
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
        return self.policy.match(request.tokens, request.source.cache_salt)

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
        """Free the slot and the pages of the request. No launched step names it, so what it has
        computed is known, and stays cached as far as the policy wants."""
        self.store(request, min(request.upper, len(request.tokens) - 1))
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
        request.estimate_version = self.policy.version
        request.cached_estimate = 0
        if self.may_use_cache(request):
            request.cached_estimate = self.policy.cached(request.tokens, request.source.cache_salt)

    def can_gain_from_cache(self, request: Request) -> bool:
        """Whether it could resume where another request with the same prompt has been."""
        return self.may_use_cache(request) and self.policy.can_resume(request.prompt_len)

    def record_prompt(self, request: Request) -> None:
        """Note the request's prompt, so that later prompts discover what they share with it."""
        self.policy.record_prompt(request.tokens, request.source.cache_salt)

    def boundaries(self, request: Request, shared: int) -> list[int]:
        """Where this prompt's prefill stops for snapshots, nearest last. shared: tokens that an
        earlier prompt began with too."""
        if not self._limits.prefix_caching:
            return []
        ends = request.source.boundaries
        return self.policy.stops(request.computed, len(request.tokens), ends, shared)

    def take_snapshot(self, request: Request, depth: int) -> int | None:
        """Allocate a snapshot for the request's first `depth` tokens. None: there is one already,
        or launched steps write all of them."""
        return self.policy.begin_save(request.tokens[:depth], request.source.cache_salt)

    def publish(self, request: Request, depth: int, snapshot: int) -> None:
        """Insert the snapshot of the request's first `depth` tokens, which has been written."""
        pages = request.pages[: depth // self._limits.page_size]
        self.policy.publish(request.tokens[:depth], pages, snapshot, request.source.cache_salt)

    def store(self, request: Request, length: int) -> None:
        """The request's first `length` tokens have been computed: cache what needs no snapshot."""
        if self._limits.prefix_caching and not request.failed:
            self.policy.store(request.tokens[:length], request.pages, request.source.cache_salt)

    # --- integrity --------------------------------------------------------------------------

    def check(self, owners: Collection[Request], saving: int) -> None:
        """Raise AssertionError unless every page, slot and snapshot is accounted for. owners: the
        requests that have slots and pages. saving: snapshots that launched steps write."""
        self.policy.check(saving)
        cached = self.policy.cached_pages()
        expected = Counter(cached)
        for request in owners:
            expected.update(request.pages)
        for page in range(NULL_PAGE + 1, self._limits.num_pages):
            assert self.pages.ref_count(page) == expected[page], f"reference count of page {page}"
        alone = sum(expected[page] == 1 for page in cached)
        assert self.pages.evictable == alone, "pages that only the prefix cache holds"
        slots = [request.slot for request in owners]
        assert len(set(slots)) == len(slots) == self.slots.size - self.slots.free, "slots"
        for request in owners:
            covered = len(request.pages) * self._limits.page_size
            needed = min(request.computed, request.max_total)
            assert covered >= needed, "pages cover what was computed"
