"""Slots, pages and snapshots: which request or cached prefix owns what of the device's memory.

It allocates and frees what the scheduler asks for. It does not decide which request runs, waits or
is preempted, nor when the resources of a request may be freed. What is cached, and what is given up
for pages, is decided by the cache policy (`engine/cache/policy.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from millrace.engine.cache.page_tree import PageTree
from millrace.engine.cache.policy import NO_SNAPSHOT, CachePolicy, Kind, Match
from millrace.engine.cache.pool import NULL_PAGE, Pool
from millrace.engine.cache.prefix_tiers import PrefixTiers, Tier
from millrace.engine.cache.snapshot_tree import SnapshotTree
from millrace.engine.request import Request
from millrace.engine.tier_transfers import TierTransfers
from millrace.protocol import CacheReport, Limits, PageCopy, PageGrant, Save

EXCERPT = 16  # tokens on each side of where a prompt leaves what is known
_NOTHING = Match(0, [], NO_SNAPSHOT, 0)


@dataclass(frozen=True, slots=True)
class Granted:
    """What an admitted request gets: pages, and copies of pages that others go on using."""

    grants: list[PageGrant]
    copies: list[PageCopy]


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
        page_cost=limits.page_cost,
    )


class KVManager:
    """The pools of one replica, and the policy that keeps the prefixes it has seen."""

    def __init__(self, limits: Limits) -> None:
        self.slots = Pool(limits.max_num_seqs, first=1)
        self.pages = Pool(limits.num_pages - 1, first=NULL_PAGE + 1)
        self.policy = cache_policy(limits, self.pages)
        self._prefix_tiers = PrefixTiers()
        self.tiers: TierTransfers | None = None
        resumes = limits.num_snapshots or limits.cache_policy == "page"
        if limits.host_cache and limits.prefix_caching and resumes:
            self.tiers = TierTransfers(limits, self.pages, self.policy, self._prefix_tiers)
            self.policy.lower_tiers = True
        self._limits = limits
        self._ends: dict[int, Save] = {}  # by snapshot: slots that the next step saves

    # --- pages ------------------------------------------------------------------------------

    def missing_pages(self, request: Request, length: int) -> int:
        """Pages that the request lacks for `length` tokens."""
        return -(-length // self._limits.page_size) - len(request.pages)

    def ensure_free_pages(self, count: int, load: bool = False) -> bool:
        """Evict snapshots until `count` pages are free. False, and nothing evicted, if that is not
        possible. load: for a load from a lower tier, which takes nothing from other loads: else
        two that are large would drive each other out for ever."""
        if self.tiers is not None and self.pages.free + self.pages.evictable < count:
            self.tiers.release_all(loaded=not load)
        if self.pages.free + self.pages.evictable < count:
            return False
        while self.pages.free < count:
            self.policy.evict()
        return True

    def ensure_pages_for_load(self, count: int) -> bool:
        """As `ensure_free_pages`, for a load from a lower tier."""
        return self.ensure_free_pages(count, load=True)

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
        salt = request.source.cache_salt
        found = self.policy.match(request.tokens, salt)
        self._pin(request, request.tokens)
        return found

    def _pin(self, request: Request, tokens: Sequence[int]) -> None:
        """Keep what the request's client has asked to keep, of a cached prefix."""
        if any(request.source.pins):
            self.policy.pin(tokens, request.source.pins, request.source.cache_salt)

    def admit(self, request: Request, match: Match, length: int, spare: int) -> Granted | None:
        """Allocate a slot (one is free) and the pages for `length` tokens, and share those of the
        match; of an unfinished page the request gets a copy, because it writes in it. None, and
        nothing allocated, if fewer than `spare` pages would stay free."""
        whole = match.tokens // self._limits.page_size
        self._hold(request, match)
        if self.tiers is not None:
            self.tiers.release(request)
        self.pages.retain_all(match.pages[:whole])
        missing = -(-length // self._limits.page_size) - whole
        if not self.ensure_free_pages(missing + spare):
            self.pages.release_all(match.pages[:whole])
            self.admitted(request)
            return None
        request.slot = self.slots.allocate(1)[0]
        request.pages = match.pages[:whole]
        shared = [PageGrant(request.slot, 0, match.pages[:whole])] if whole else []
        own = self.grant(request, missing)
        copies = [PageCopy(page, own.pages[0]) for page in match.pages[whole:]]
        return Granted([*shared, own], copies)

    def _hold(self, request: Request, match: Match) -> None:
        """Keep what the request's first step reads, until `admitted`."""
        request.held_pages = match.pages[match.tokens // self._limits.page_size :]
        self.pages.retain_all(request.held_pages)
        request.held_snapshot = match.snapshot
        if match.snapshot != NO_SNAPSHOT:
            self.policy.retain(match.snapshot)

    def admitted(self, request: Request) -> None:
        """The first step of the request has run, or will not."""
        self.pages.release_all(request.held_pages)
        request.held_pages = []
        if request.held_snapshot != NO_SNAPSHOT:
            self.policy.release(request.held_snapshot)
            request.held_snapshot = NO_SNAPSHOT

    def release(self, request: Request) -> None:
        """Free the slot and the pages of the request. No launched step names it, so what it has
        computed is known, and stays cached as far as the policy wants."""
        self.store(request, min(request.upper, len(request.tokens) - 1))
        if request.ended:
            self._offload_pages(request)
        self.pages.release_all(request.pages)
        request.pages = []
        self.slots.release(request.slot)
        request.slot = 0

    # --- prefixes ---------------------------------------------------------------------------

    def may_use_cache(self, request: Request) -> bool:
        """Whether its prompt may come from the cache: not if it asks for prompt log-
        probabilities."""
        return self._limits.prefix_caching and request.source.params.prompt_logprobs is None

    def estimate_cached_tokens(self, request: Request) -> bool:
        """Look up how much of a waiting request's prompt is cached now, and begin to bring what a
        lower tier has more. Returns whether that has no room on the device."""
        if request.estimate_version != self.policy.version:
            request.estimate_version = self.policy.version
            request.cached_estimate = 0
            if self.may_use_cache(request):
                salt = request.source.cache_salt
                request.cached_estimate = self.policy.cached(request.tokens, salt)
        if self.tiers is None or not self.may_use_cache(request):
            return False
        return self.tiers.look_up(request, self.ensure_pages_for_load)

    def can_gain_from_cache(self, request: Request) -> bool:
        """Whether it could resume where another request with the same prompt has been."""
        return self.may_use_cache(request) and self.policy.can_resume(request.prompt_len)

    def record_prompt(self, request: Request) -> None:
        """Note the request's prompt, so that later prompts discover what they share with it."""
        self.policy.record_prompt(request.tokens, request.source.cache_salt)

    def report(self, request: Request) -> CacheReport:
        """What the cache had of an admitted request's prompt. Ask before `record_prompt`."""
        prompt = request.tokens[: request.prompt_len]
        found = self.policy.compare(prompt, request.source.cache_salt)
        known = max(found.known, request.cached_tokens)
        evicted = found.evicted if found.evicted > request.cached_tokens else 0
        return CacheReport(
            request.cached_tokens,
            known,
            evicted,
            list(prompt[max(0, known - EXCERPT) : known]),
            list(prompt[known : known + EXCERPT]),
            found.other[:EXCERPT] if known == found.known else [],
            dict(request.loaded),
            self._written(request),
        )

    def _written(self, request: Request) -> int:
        """Prompt tokens that it computes and that will be cached."""
        prompt, salt = request.tokens[: request.prompt_len], request.source.cache_salt
        if not self.may_use_cache(request):
            return 0
        found = self.policy.written(prompt, request.boundaries, salt)
        return max(0, found - request.cached_tokens)

    def boundaries(self, request: Request, shared: int, resumed: Kind | None = None) -> list[int]:
        """Where this prompt's prefill stops for snapshots, nearest last. shared: tokens that an
        earlier prompt began with too. resumed: the kind of snapshot that it resumes from; None: of
        none, or others wait for its prompt to be cached."""
        if not self._limits.prefix_caching:
            return []
        ends, length = request.source.boundaries, len(request.tokens)
        stops = self.policy.stops(request.computed, length, ends, shared, resumed)
        return self._with_hand_over(request, stops) if request.source.hand_over else stops

    def _with_hand_over(self, request: Request, stops: list[int]) -> list[int]:
        """The stops of a prompt whose record is handed over: the end, too, in place of the last
        whole page."""
        depth = self._hand_over_depth(request)
        if self._limits.cache_policy == "page" or depth <= request.computed:
            return stops
        return [depth, *(stop for stop in stops if stop < self._whole(depth))]

    def _hand_over_depth(self, request: Request) -> int:
        assert self.tiers is not None
        return self.tiers.hand_overs.depth(request)

    def hand_over(self, request: Request) -> None:
        """The request's prompt has been computed up to its record, or is cached: let another engine
        take that, if one wants it and nobody has asked before."""
        if request.source.hand_over and request.handed_over < 0:
            assert self.tiers is not None
            self.tiers.hand_over(request)

    def grow_hand_over(self, request: Request, length: int) -> None:
        """The first `length` tokens of the request's prompt have been computed, and not all."""
        if request.source.hand_over and request.handed_over < 0 and not request.failed:
            assert self.tiers is not None
            self.tiers.grow(request, length)

    def end_hand_over(self, request: Request) -> None:
        """The request is gone; a record that is not whole will not be."""
        if request.source.hand_over and self.tiers is not None:
            self.tiers.give_up(request, "its request has ended")

    def take_snapshot(self, request: Request, depth: int) -> int | None:
        """Allocate a snapshot for the request's first `depth` tokens. None: there is one already,
        or launched steps write all of them."""
        return self.policy.begin_save(request.tokens[:depth], request.source.cache_salt)

    def lacks_snapshot(self, request: Request) -> bool:
        """Whether the record of the request's prompt is wanted, and every snapshot is in use: the
        records of others, for a step or a transfer."""
        wanted = bool(request.source.hand_over) and request.handed_over < 0
        return wanted and not self.policy.can_save()

    def publish(self, request: Request, depth: int, snapshot: int) -> None:
        """Insert the snapshot of the request's first `depth` tokens, which has been written."""
        pages = request.pages[: -(-depth // self._limits.page_size)]
        ends_turn = any(self._whole(end) == depth for end in request.source.boundaries)
        whole_prompt = depth >= self._whole(len(request.tokens) - 1)
        kind = Kind.PROMPT if whole_prompt and not ends_turn else Kind.TURNS
        salt = request.source.cache_salt
        tokens = request.tokens[:depth]
        self._publish(request, tokens, pages, snapshot, kind)
        if self.tiers is not None and not request.failed:
            self.tiers.cached(tokens, salt, kind, request.hashes, request.source.tag)
        if request.source.hand_over and depth == self._hand_over_depth(request):
            self.hand_over(request)

    def _publish(
        self, request: Request, tokens: Sequence[int], pages: list[int], snapshot: int, kind: Kind
    ) -> None:
        salt, tag = request.source.cache_salt, request.source.tag
        self.policy.publish(tokens, pages, snapshot, salt, kind=kind, tag=tag)
        self._pin(request, tokens)
        self.prefix_tiers.set(tag, Tier.DEVICE, there=True)

    @property
    def prefix_tiers(self) -> PrefixTiers:
        """In which tiers prefixes are."""
        evicted, self.policy.evicted_tags = self.policy.evicted_tags, []
        for tag in evicted:
            self._prefix_tiers.set(tag, Tier.DEVICE, there=False)
        return self._prefix_tiers

    def _whole(self, length: int) -> int:
        """`length` rounded down to whole pages."""
        return length // self._limits.page_size * self._limits.page_size

    def save_end(self, request: Request) -> None:
        """A request has ended, and its slot has the state of all tokens but the last one: make that
        a snapshot, which the next step writes before anything else."""
        if not request.source.hand_over:
            self._save_slot(request, request.tokens[:-1], Kind.ANSWER)

    def save_part(self, request: Request) -> None:
        """A request was aborted, and its slot has the state of the first `computed` tokens of its
        prompt: save that the same way, so that who sends the prompt again goes on from there."""
        tokens = request.tokens[: request.computed]
        have = self.policy.cached(request.tokens[: len(tokens) + 1], request.source.cache_salt)
        if self.may_use_cache(request) and len(tokens) - have > self._limits.snapshot_distance:
            self._save_slot(request, tokens, Kind.TURNS)

    def _save_slot(self, request: Request, tokens: Sequence[int], kind: Kind) -> None:
        """Let the next step save what the request's slot has: the state of `tokens`."""
        if not self._limits.prefix_caching or request.failed:
            return
        salt = request.source.cache_salt
        snapshot = self.policy.begin_save(tokens, salt, kind=Kind.ANSWER)
        if snapshot is None:
            return
        pages = request.pages[: -(-len(tokens) // self._limits.page_size)]
        self._publish(request, tokens, pages, snapshot, kind)
        # One that was evicted before it was written may be in use again: the last one counts.
        self._ends[snapshot] = Save(request.slot, snapshot)
        if self.tiers is not None:
            self.tiers.cached(tokens, salt, kind, request.hashes, request.source.tag)

    @property
    def has_ends(self) -> bool:
        """Whether there are slots to save."""
        return bool(self._ends)

    def take_ends(self) -> list[Save]:
        """The slots that the next step saves."""
        ends, self._ends = list(self._ends.values()), {}
        return ends

    def store(self, request: Request, length: int) -> None:
        """The request's first `length` tokens have been computed: cache what needs no snapshot."""
        if self._limits.prefix_caching and not request.failed:
            self.policy.store(request.tokens[:length], request.pages, request.source.cache_salt)

    def _offload_pages(self, request: Request) -> None:
        """A request has ended, and its prefix is its pages: have them in lower tiers, too."""
        if self.tiers is None or self._limits.cache_policy != "page" or request.failed:
            return
        tokens = request.tokens[: self._whole(len(request.tokens) - 1)]
        if tokens and self._limits.prefix_caching and not request.source.hand_over:
            salt, tag = request.source.cache_salt, request.source.tag
            self.tiers.cached(tokens, salt, Kind.ANSWER, request.hashes, tag)

    def clear(self) -> None:
        """Drop every cached prefix, in all tiers."""
        self.policy.clear()
        if self.tiers is not None:
            self.tiers.clear()

    # --- integrity --------------------------------------------------------------------------

    def check(self, owners: Collection[Request], saving: int) -> None:
        """Raise AssertionError unless every page, slot and snapshot is accounted for. owners: the
        requests that have slots and pages. saving: snapshots that launched steps write."""
        held = sum(request.held_snapshot != NO_SNAPSHOT for request in owners)
        if self.tiers is not None:
            held += self.tiers.held_snapshots()
            self.tiers.store.check()
        self.policy.check(saving + held)
        cached = self.policy.cached_pages()
        expected = Counter(cached)
        for request in owners:
            expected.update(request.pages)
            expected.update(request.held_pages)
        if self.tiers is not None:
            expected.update(self.tiers.held_pages())
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
