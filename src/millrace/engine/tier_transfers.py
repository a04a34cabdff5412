"""Transfers between the device, the host's memory, files and other engines: which are under way,
and for whom.

Every answer, and every system prompt, is offloaded soon after it is cached on the device, so that
evicting it there costs nothing, and written to files, so that it survives the process. A waiting
request whose prompt goes on in a lower tier waits until that part is on the device, and other
requests run meanwhile. What the device holds is cached by its cache policy; `ColdStore` knows what
the tiers below hold. This module moves nothing itself: the worker does, and reports what has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec

from millrace.engine.cache.cold_store import (
    NOWHERE,
    ColdRecord,
    ColdSizes,
    ColdStore,
    file_move,
    page_hashes,
)
from millrace.engine.cache.policy import NO_SNAPSHOT, CachePolicy, Kind, Match
from millrace.engine.cache.pool import Pool
from millrace.engine.cache.prefix_tiers import PrefixTiers, Tier
from millrace.engine.hand_over import NO_ROOM, Growth, HandOvers
from millrace.engine.request import Phase, Request
from millrace.protocol import (
    EngineStats,
    Limits,
    Move,
    RecordMove,
    Transfer,
    TransferEnd,
    TransferKind,
)

MOST_WAITING = 256  # prefixes that wait to be offloaded; of more, the oldest are dropped
MOST_AT_ONCE = 4  # transfers of a kind
MOST_RECEIVED = 16  # records that come at once; most of them wait for their prompts
CLEARED = "the cache was cleared meanwhile"
LEAST_GAIN = 32  # tokens that a load must save


@dataclass(slots=True)
class _Transfer:
    """One that is under way. pages: the device's, with a reference each. snapshot: likewise; -1:
    none. fetched: records whose pages are read from files. fetched_state: whether the record's
    state is moved between memory and files, too. parts: of the record, that are written with it.
    name: by which another engine may take the record. growth: that it brings on, by the prompt's
    pages from `begins` on. dropped: what it moves must not be used any more."""

    kind: TransferKind
    record: ColdRecord
    tokens: Sequence[int] = ()
    pages: list[int] = field(default_factory=list)
    snapshot: int = -1
    request: Request | None = None
    fetched: list[ColdRecord] = field(default_factory=list)
    fetched_state: bool = False
    from_disk: bool = False
    parts: list[ColdRecord] = field(default_factory=list)
    name: str = ""
    growth: Growth | None = None
    begins: int = 0
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class _Held:
    """Pages and a snapshot of the device, with a reference each."""

    pages: list[int]
    snapshot: int


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A prefix to offload. hashes: of its first pages, as far as they are known. held: what keeps
    it on the device until then; None: nothing does."""

    tokens: Sequence[int]
    salt: str
    kind: Kind
    hashes: Sequence[bytes]
    held: _Held | None
    tag: int


class TierTransfers:
    """The tiers below the device of one replica."""

    def __init__(
        self, limits: Limits, pages: Pool, policy: CachePolicy, prefix_tiers: PrefixTiers
    ) -> None:
        sizes = ColdSizes(
            limits.page_size,
            limits.page_bytes,
            limits.snapshot_bytes,
            limits.host_cache,
            limits.disk_cache,
        )
        self.store = ColdStore(sizes, prefix_tiers)
        self.hand_overs = HandOvers(limits, self.store, policy)
        self._has_states = limits.cache_policy == "snapshot"  # or prefixes are their pages
        self._prefix_tiers = prefix_tiers
        self._pages, self._policy = pages, policy
        self._wanted: deque[_Wanted] = deque(maxlen=MOST_WAITING)
        self._unfiled: deque[ColdRecord] = deque()  # at most what is in memory
        self._under_way: dict[int, _Transfer] = {}
        self._words: set[int] = set()  # transfers that only say why there is no record
        self._new: list[Transfer] = []
        resumable = limits.num_snapshots or limits.max_num_seqs
        self._most_held = max(1, resumable // 2)  # of those wanted, and of those loaded
        self._loaded_for: dict[str, _Held] = {}  # by request, until it is admitted
        self._parked: list[Request] = []  # they wait until any transfer ends
        self._number = 0

    @property
    def has_work(self) -> bool:
        """Whether there is something to start, or to wait for. What others may take needs no
        step."""
        waits = self.waits_for_any or self._new or self.hand_overs.has_work
        return bool(waits or self._wanted or self._unfiled or self.store.deletes)

    @property
    def waits_for_any(self) -> bool:
        """Whether a transfer is under way that ends by itself, soon."""
        return any(one.kind != "send" for one in self._under_way.values())

    # --- what is kept -----------------------------------------------------------------------

    def cached(
        self,
        tokens: Sequence[int],
        salt: str,
        kind: Kind,
        hashes: Sequence[bytes] = (),
        tag: int = 0,
    ) -> None:
        """These tokens are cached on the device now. hashes: of a sequence that begins with these,
        or that these begin with. tag: as in `AddRequest`."""
        if kind is Kind.PROMPT:  # its answer follows
            return
        if len(self._wanted) == MOST_WAITING:
            self._drop(self._wanted.popleft().held)
        held = None
        found = self._policy.locate(tokens, salt)
        if found is not None and sum(w.held is not None for w in self._wanted) < self._most_held:
            held = self._hold(found.pages, found.snapshot)
        self._wanted.append(_Wanted(tokens, salt, kind, hashes, held, tag))

    def _hold(self, pages: list[int], snapshot: int) -> _Held:
        self._pages.retain_all(pages)
        if snapshot != NO_SNAPSHOT:
            self._policy.retain(snapshot)
        return _Held(pages, snapshot)

    def _drop(self, held: _Held | None) -> None:
        """Undo `_hold`."""
        if held is not None:
            self._pages.release_all(held.pages)
            self._release_snapshot(held.snapshot)

    def _release_snapshot(self, snapshot: int) -> None:
        if snapshot != NO_SNAPSHOT:
            self._policy.release(snapshot)

    def release(self, request: Request) -> None:
        """The request has been admitted, or is gone: what was loaded for it may be evicted."""
        self._drop(self._loaded_for.pop(request.id, None))

    def release_all(self, loaded: bool = True) -> None:
        """Memory is short: nothing but transfers keeps anything on the device; or, without
        `loaded`, transfers and what was loaded for waiting requests."""
        if loaded:
            for held in self._loaded_for.values():
                self._drop(held)
            self._loaded_for.clear()
        for wanted in self._wanted:
            self._drop(wanted.held)
        kept = [replace(wanted, held=None) for wanted in self._wanted]
        self._wanted = deque(kept, maxlen=MOST_WAITING)

    def take(self) -> list[Transfer]:
        """The transfers that the next step starts."""
        while self._wanted and self._count("offload") < MOST_AT_ONCE:
            wanted = self._wanted.popleft()
            self._offload(wanted)
            self._drop(wanted.held)
        while self._unfiled and self._count("store") < MOST_AT_ONCE:
            self._file(self._unfiled.popleft())
        while self._count("receive") < MOST_RECEIVED and self._receive():
            pass
        new, self._new = self._new, []
        return new

    def take_deletes(self) -> list[tuple[str, bool]]:
        """The files that the next step deletes."""
        deletes, self.store.deletes = self.store.deletes, []
        return deletes

    def _count(self, kind: str) -> int:
        return sum(one.kind == kind for one in self._under_way.values())

    def _start(
        self,
        transfer: _Transfer,
        moves: Sequence[Move] = (),
        files: bool = False,
        record: RecordMove | None = None,
    ) -> None:
        self._number += 1
        listed = []
        if transfer.kind == "store":
            state = transfer.fetched_state
            listed = [file_move(transfer.record, self.store, pages=True, state=state)]
        elif files:
            listed = [
                file_move(
                    one,
                    self.store,
                    pages=one in transfer.fetched,
                    state=one is transfer.record and transfer.fetched_state,
                )
                for one in transfer.record.chain()
                if one in transfer.fetched or (one is transfer.record and transfer.fetched_state)
            ]
        for one in transfer.record.chain():
            one.busy += 1
        self._under_way[self._number] = transfer
        self._new.append(Transfer(self._number, transfer.kind, list(moves), listed, record))

    def _offload(self, wanted: _Wanted) -> None:
        found = self._policy.locate(wanted.tokens, wanted.salt)
        if found is None:  # evicted meanwhile
            return
        size = self.store.sizes.page_size
        hashes = page_hashes(wanted.tokens, size, wanted.salt, wanted.hashes)
        records = self.store.add_long(wanted.tokens, hashes, wanted.salt, wanted.kind)
        if not records:
            return
        *parts, record = records
        record.tag = wanted.tag
        held = self._hold(found.pages[records[0].first :], found.snapshot)
        moves = [self._part_move(part, found.pages) for part in parts]
        moves.append(self._offload_move(record, found.pages, found.snapshot))
        one = _Transfer("offload", record, pages=held.pages, snapshot=held.snapshot, parts=parts)
        self._start(one, moves)

    def _part_move(self, part: ColdRecord, pages: list[int]) -> Move:
        """As `_offload_move`, of a part of a record, which has no state."""
        own = pages[part.first : part.whole]
        return Move(own, 0, len(own), part.pages_at, NO_SNAPSHOT, NOWHERE)

    def _offload_move(self, record: ColdRecord, pages: list[int], snapshot: int) -> Move:
        """From the device to a record's memory. pages: of the whole prefix."""
        own = pages[record.first :]
        return Move(own, 0, len(own), record.pages_at, snapshot, record.state_at)

    def _file(self, record: ColdRecord) -> None:
        """Write a record to files, if it is still in memory and not in files; without its state if
        a later turn has replaced that."""
        if record.pages_at == NOWHERE or record.key not in self.store:
            return
        state = record.state_at != NOWHERE and not record.state_filed
        if state or not record.pages_filed:
            self._start(_Transfer("store", record, fetched_state=state))

    # --- other engines ------------------------------------------------------------------------

    def grow(self, request: Request, length: int) -> None:
        """The first tokens of a prompt are computed, whose record is handed over: pages that have
        become final go on their way."""
        if (growth := self.hand_overs.growth(request)) is None:
            return
        # Drafters may still write rows of the last token.
        final = min(length - 1, self.hand_overs.depth(request)) // self.store.sizes.page_size
        pages = request.pages[growth.copied : final]
        if pages:
            self._bring_on(growth, pages, NO_SNAPSHOT)

    def _bring_on(self, growth: Growth, pages: list[int], snapshot: int) -> None:
        """Copy the next pages of a record from the device; with a snapshot: its state."""
        record, begins = growth.record, growth.copied
        held = self._hold(pages, snapshot)
        state_at = record.state_at if growth.sealing else NOWHERE
        first = begins - record.first
        move = Move(pages, first, record.own_pages, record.pages_at, snapshot, state_at)
        growth.moving.append(begins)
        growth.copied += len(pages)
        one = _Transfer("offload", record, pages=held.pages, snapshot=held.snapshot, growth=growth)
        one.begins = begins
        self._start(one, [move])

    def hand_over(self, request: Request) -> None:
        """Let another engine take the record of the request's prompt, which is on the device."""
        depth, salt = self.hand_overs.depth(request), request.source.cache_salt
        found = self._policy.locate(request.tokens[:depth], salt) if depth else None
        if found is None:
            why = "no snapshot was free for it" if depth else "a prompt of one token has none"
            self._refuse(request, why)
            return
        growth = self.hand_overs.growth(request)
        if growth is None:
            self._hand_over_known(request, found)
        else:
            growth.sealing = True
            self._bring_on(growth, found.pages[growth.copied :], found.snapshot)
            request.handed_over = depth
        self.hand_overs.forget_growth(request)

    def _hand_over_known(self, request: Request, found: Match) -> None:
        """The record is in the host's memory already, or comes there; or there is no room."""
        record, name = self.hand_overs.record_of(request), request.source.hand_over
        growth = self.hand_overs.growth_of(record) if record is not None else None
        if growth is not None and not growth.why:
            growth.names.append(name)
        elif record is None or not record.has_state or not _in_memory(record):
            self._refuse(request, NO_ROOM)
            return
        else:
            held = self._hold(found.pages, found.snapshot)
            record.tag = request.source.tag
            # Without a move it ends behind those that are under way, which may bring the record.
            one = _Transfer("offload", record, pages=held.pages, snapshot=held.snapshot, name=name)
            self._start(one)
        request.handed_over = self.hand_overs.depth(request)

    def _refuse(self, request: Request, why: str) -> None:
        self.give_up(request, why)
        request.handed_over, request.not_handed_over = 0, why

    def give_up(self, request: Request, why: str) -> None:
        """The record of its prompt will not be whole, if it is not yet."""
        growth = self.hand_overs.forget_growth(request)
        if growth is not None and not growth.sealing:
            self._give_up(growth, why)
        elif growth is None and request.handed_over < 0:
            self._tell(self.hand_overs.refused(request.source.hand_over, why))

    def _give_up(self, growth: Growth, why: str) -> None:
        growth.why = growth.why or why
        if not growth.moving:
            self._end_growth(growth)

    def _grown(self, growth: Growth, one: _Transfer) -> None:
        """More of a record is in the host's memory."""
        growth.moving.remove(one.begins)
        if growth.why:
            self._give_up(growth, growth.why)
            return
        if growth.ready < 0:
            self.hand_overs.end_growth(growth)
            self._prefix_tiers.set(growth.record.tag, Tier.HOST, there=True)
        for name in growth.names if growth.ready < 0 else growth.names[:1]:
            move = self.hand_overs.offered(growth.record, name, growth.ready)
            if name in growth.open:
                self._start(_Transfer("grow", growth.record), record=move)
            else:
                growth.open.add(name)
                self._start(_Transfer("send", growth.record, name=name, growth=growth), record=move)

    def _end_growth(self, growth: Growth) -> None:
        """Nothing is on its way any more of a record that will not be whole."""
        for name in growth.names:
            kind: TransferKind = "grow" if name in growth.open else "send"
            self._tell(self.hand_overs.refused(name, growth.why), kind)
        self.hand_overs.end_growth(growth)

    def _tell(self, refused: RecordMove, kind: TransferKind = "send") -> None:
        """Tell whoever asks for a record why there is none."""
        self._number += 1
        self._words.add(self._number)
        self._new.append(Transfer(self._number, kind, record=refused))

    def _receive(self) -> bool:
        """Begin to bring the next record that a request waits for. False: there is none, or no
        room for it now."""
        waits = self.waits_for_any or bool(self.hand_overs.growths)
        begun = self.hand_overs.next(waits)
        if begun is None:
            return False
        fetched = [begun.record] if begun.new_pages else []
        one = _Transfer(
            "receive", begun.record, request=begun.request, fetched=fetched, fetched_state=True
        )
        self._start(one, record=begun.move)
        return True

    def _received(self, one: _Transfer, end: TransferEnd) -> None:
        assert one.request is not None
        if end.succeeded and not one.dropped:
            self._prefix_tiers.set(one.record.tag, Tier.HOST, there=True)
            self.hand_overs.received(one.request, one.record, end)
            return
        for record in one.fetched:
            self.store.forget_pages(record)
        self.store.forget_state(one.record)
        why = CLEARED if end.succeeded else end.error
        self.hand_overs.lost(one.request, one.record, why)

    # --- what comes back ----------------------------------------------------------------------

    def look_up(self, request: Request, ensure_pages: Callable[[int], bool]) -> bool:
        """Begin to bring a waiting request's prefix to the device, if a lower tier has more of it.
        Returns whether it has, but there is no room for it, and no transfer that could leave any.

        ensure_pages: makes so many pages free; False if that is not possible.
        """
        store, tokens = self.store, request.tokens
        if not len(store) or request.loading:
            return False
        gain = LEAST_GAIN if request.cached_estimate >= request.expected else 1
        if len(request.hashes) != len(tokens) // store.sizes.page_size + 1:
            salt = request.source.cache_salt
            request.hashes = page_hashes(tokens, store.sizes.page_size, salt, request.hashes)
        record = store.match(tokens, request.hashes)
        if record is None or store.depth(record) < request.cached_estimate + gain:
            return False
        missing = [one for one in record.chain() if one.pages_at == NOWHERE]
        kind: Literal["fetch", "load"] = "load"
        if missing or record.state_at == NOWHERE:
            kind = "fetch"
        needed = set(record.chain())
        busy = [one for one in self._under_way.values() if one.kind not in ("store", "send")]
        if self._count(kind) >= MOST_AT_ONCE or any(one.record in needed for one in busy):
            started = False  # or a part is on its way, for another request or from the device
        elif kind == "fetch":
            started = self._fetch(request, record, missing)
        else:
            started = self._load(request, record, ensure_pages, from_disk=False)
        if not started and self.waits_for_any:
            request.loading = True
            self._parked.append(request)
        return not started and not request.loading

    def _fetch(self, request: Request, record: ColdRecord, missing: list[ColdRecord]) -> bool:
        """False: the host's memory has no room."""
        chain = record.chain()
        for one in chain:
            one.busy += 1  # what is there must not go for what is to come
        fetched: list[ColdRecord] = []
        state = record.state_at == NOWHERE
        fetched += [one for one in missing if one is record or self.store.room_for_pages(one)]
        enough = len(fetched) == len(missing) and self.store.make_room(record)
        for one in chain:
            one.busy -= 1
        if not enough:
            for one in fetched:
                if one.pages_at != NOWHERE and one is not record:
                    self.store.forget_pages(one)
            return False
        self.store.touch(record)
        request.loading = True
        self._start(
            _Transfer(
                "fetch",
                record,
                request=request,
                fetched=fetched,
                fetched_state=state,
                tokens=request.tokens,
            ),
            files=True,
        )
        return True

    def _load(
        self,
        request: Request,
        record: ColdRecord,
        ensure_pages: Callable[[int], bool],
        from_disk: bool,
    ) -> bool:
        """False: the device has no room."""
        store, salt = self.store, request.source.cache_salt
        tokens = request.tokens[: store.depth(record)]
        here = self._policy.pages_of(tokens, salt)[: record.whole]
        self._pages.retain_all(here)
        count = record.whole + bool(record.tail) - len(here)
        snapshot = self._snapshot_for(tokens, salt) if ensure_pages(count) else None
        if snapshot is None or self._pages.free < count:
            if snapshot is not None:
                self._release_snapshot(snapshot)
            self._pages.release_all(here)
            return False
        pages = [*here, *self._pages.allocate(count)]
        moves = self._moves(record, pages, len(here), snapshot)
        store.touch(record)
        request.loading = True
        self._start(
            _Transfer(
                "load",
                record,
                tokens=tokens,
                pages=pages,
                snapshot=snapshot,
                request=request,
                from_disk=from_disk,
            ),
            moves,
        )
        return True

    def _snapshot_for(self, tokens: Sequence[int], salt: str) -> int | None:
        """The snapshot that a load writes; NO_SNAPSHOT where prefixes are their pages. None: there
        is none free."""
        return self._policy.begin_save(tokens, salt) if self._has_states else NO_SNAPSHOT

    def _moves(self, record: ColdRecord, pages: list[int], start: int, snapshot: int) -> list[Move]:
        """The moves of pages from `start` on, one for each record of the chain that has any."""
        moves = []
        for one in record.chain():
            end = one.first + one.own_pages if one is record else one.whole
            begin = max(start, one.first)
            last = one is record
            if begin < end or last:
                moves.append(
                    Move(
                        pages[begin:end],
                        begin - one.first,
                        one.own_pages,
                        one.pages_at,
                        snapshot if last else -1,
                        one.state_at if last else NOWHERE,
                    )
                )
        return moves

    # --- what has ended -----------------------------------------------------------------------

    def ended(self, end: TransferEnd, ensure_pages: Callable[[int], bool]) -> list[Request]:
        """A transfer has ended. Returns the requests that waited for it, and are to be looked up
        again."""
        if end.id in self._words:
            self._words.remove(end.id)
            return []
        one, succeeded = self._under_way.pop(end.id), end.succeeded
        for record in one.record.chain():
            record.busy -= 1
        if one.kind == "offload":
            self._offloaded(one)
        elif one.kind == "store":
            if succeeded:
                self.store.filed(one.record, one.fetched_state)
            if one.dropped:
                self.store.discard(one.record)
        elif one.kind == "load":
            self._loaded(one)
        elif one.kind == "send":
            if one.growth is None or not one.growth.why:  # that is counted already
                self.hand_overs.sent(end)
            if one.growth is not None:
                one.growth.open.discard(one.name)
        elif one.kind == "grow":
            pass
        elif one.kind == "receive":
            self._received(one, end)
        else:
            self._fetched(one, succeeded, ensure_pages)
        self.store.settle(one.record)
        waited, self._parked = self._parked, []
        for request in waited:
            request.loading = False
        if one.request is not None and not one.request.loading:
            waited.append(one.request)
        return waited

    def _offloaded(self, one: _Transfer) -> None:
        self._pages.release_all(one.pages)
        self._release_snapshot(one.snapshot)
        if one.growth is not None:
            self._grown(one.growth, one)
        elif one.dropped:
            self.store.discard(one.record)
            if one.name:
                self._tell(self.hand_overs.refused(one.name, CLEARED))
        else:
            self._prefix_tiers.set(one.record.tag, Tier.HOST, there=True)
            if one.name:
                move = self.hand_overs.offered(one.record, one.name)
                self._start(_Transfer("send", one.record, name=one.name), record=move)
            elif self.store.sizes.disk:
                self._unfiled += [*one.parts, one.record]

    def _loaded(self, one: _Transfer) -> None:
        record = one.record
        if one.dropped:
            self._release_snapshot(one.snapshot)
            self.store.discard(record)
        else:
            kind, tag = record.kind, record.tag
            if self._has_states:
                self._policy.publish(
                    one.tokens, one.pages, one.snapshot, record.salt, kind=kind, tag=tag
                )
            else:
                self._policy.store(one.tokens, one.pages, record.salt)
            self._prefix_tiers.set(tag, Tier.DEVICE, there=True)
            self._prefix_tiers.set(tag, Tier.HOST, there=record.state_at != NOWHERE)
            self._keep_for(one.request, one.tokens, record.salt)
        self._pages.release_all(one.pages)
        assert one.request is not None
        one.request.loading = False
        tier = "disk" if one.from_disk else "host"
        if self.hand_overs.has_record_of(one.request):
            tier = "remote"
        one.request.loaded[tier] = one.request.cached_estimate, len(one.tokens)

    def _keep_for(self, request: Request | None, tokens: Sequence[int], salt: str) -> None:
        """Keep what was loaded on the device until its request is admitted."""
        found = self._policy.locate(tokens, salt)
        if request is None or request.phase is not Phase.WAITING or found is None:
            return
        if len(self._loaded_for) < self._most_held:
            self.release(request)
            self._loaded_for[request.id] = self._hold(found.pages, found.snapshot)

    def _fetched(
        self, one: _Transfer, succeeded: bool, ensure_pages: Callable[[int], bool]
    ) -> None:
        assert one.request is not None
        one.request.loading = False
        if succeeded and not one.dropped:
            if one.request.phase is Phase.WAITING:
                self._load(one.request, one.record, ensure_pages, from_disk=True)
            return
        for record in one.fetched:
            self.store.forget_pages(record)
        if one.fetched_state:
            self.store.forget_state(one.record)
        for record in [*one.fetched[::-1], *([one.record] if one.fetched_state else [])]:
            if record.key in self.store:
                self.store.lost(record)

    def with_sizes(self, stats: EngineStats) -> EngineStats:
        """The statistics with those of the tiers."""
        return msgspec.structs.replace(
            stats,
            host_cache_used=self.store.host_used,
            host_cache_total=self.store.sizes.host,
            disk_cache_used=self.store.disk_used,
            disk_cache_total=self.store.sizes.disk,
            transfers=self.hand_overs.stats(self._count("send")),
        )

    # --- integrity ----------------------------------------------------------------------------

    def clear(self) -> None:
        """Drop everything; what transfers move now, when they end."""
        for one in self._under_way.values():
            one.dropped = True
        self.hand_overs.forget_growths()
        for growth in self.hand_overs.growths:
            self._give_up(growth, CLEARED)
        self.release_all()
        self._wanted.clear()
        self._unfiled.clear()
        self.store.clear()

    def held_pages(self) -> list[int]:
        """Pages of the device that transfers hold."""
        kept = [*self._loaded_for.values(), *(w.held for w in self._wanted if w.held is not None)]
        pages = [page for one in self._under_way.values() for page in one.pages]
        return pages + [page for one in kept for page in one.pages]

    def held_snapshots(self) -> int:
        """Snapshots of the device that transfers hold."""
        kept = len(self._loaded_for) + sum(w.held is not None for w in self._wanted)
        return kept + sum(one.snapshot >= 0 for one in self._under_way.values())


def _in_memory(record: ColdRecord) -> bool:
    """Whether the host's memory has all of its pages."""
    return all(one.pages_at != NOWHERE for one in record.chain())
