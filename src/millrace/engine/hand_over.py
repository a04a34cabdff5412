"""Records that go to other engines, and that come from them: whose they are, and where they lie.

The record of a prompt that is computed here lies in the host's memory, where another engine takes
it by its name, until its lease ends. The other way round, a request whose prompt was computed
elsewhere waits until its record is here; it never computes that part itself unless it is told to.
A long prompt's record is handed over while it is computed: its pages follow each other as they
become final, and the last part, which seals it, has the state.

This module moves nothing, and starts nothing: `TierTransfers` does, with what is made here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec

from millrace.engine.cache.cold_store import NOWHERE, ColdRecord, ColdStore, page_hashes
from millrace.engine.cache.policy import CachePolicy, Kind
from millrace.engine.request import Phase, Request
from millrace.engine.validation import record_tokens
from millrace.protocol import HostPages, Limits, RecordMove, TransferEnd, TransferStats

RECEIVE_SECONDS = 30.0  # most that a record, or its next part, may take to come
NO_ROOM = "the host's memory has no room for the record; raise --host-cache-gb"


@dataclass(frozen=True, slots=True)
class Receiving:
    """A record that begins to come. new_pages: whether the memory of its pages was taken for it."""

    request: Request
    record: ColdRecord
    move: RecordMove
    new_pages: bool


@dataclass(eq=False, slots=True)
class Growth:
    """A record that is handed over while its prompt is computed.

    names: by which others take it; by the first one as soon as a part of it is in the host's
    memory. new_pages: whether the memory of its pages was taken for it. copied: pages of the prompt
    that are in that memory, or on their way; moving: where those on their way begin. sealing: the
    last ones are, with the state. open: names by which it may be taken now. why: it will not be
    whole.
    """

    record: ColdRecord
    names: list[str]
    new_pages: bool
    copied: int
    moving: list[int] = field(default_factory=list)
    sealing: bool = False
    open: set[str] = field(default_factory=set)
    why: str = ""

    @property
    def ready(self) -> int:
        """Its first pages that others may take; -1: all of it."""
        if self.sealing and not self.moving:
            return -1
        return min(self.moving, default=self.copied)


class HandOvers:
    """The hand-overs of one replica. failures: requests whose records did not come, and why."""

    def __init__(self, limits: Limits, store: ColdStore, policy: CachePolicy) -> None:
        self._limits, self._store, self._policy = limits, store, policy
        self._expected: deque[Request] = deque()
        self._kept: dict[str, ColdRecord] = {}  # by request, until it is admitted
        self._joined: dict[str, list[Request]] = {}  # by a record's key, while it comes
        self._growing: dict[str, Growth | None] = {}  # by request, until its prompt is computed
        self._growths: dict[str, Growth] = {}  # by a record's key, until it is whole
        self.failures: list[tuple[Request, str]] = []
        self._totals = TransferStats()

    @property
    def has_work(self) -> bool:
        return bool(self._expected or self.failures)

    def depth(self, request: Request) -> int:
        """Tokens of the record of a prompt, and of what it resumes with."""
        return record_tokens(request.prompt_len + len(request.source.resume), self._limits)

    # --- records that go ----------------------------------------------------------------------

    def growth(self, request: Request) -> Growth | None:
        """How far the record of a prompt is. None: it is there already, or for another request, or
        there is no memory for it."""
        if request.id not in self._growing:
            self._growing[request.id] = self._begin_growth(request)
        return self._growing[request.id]

    def _begin_growth(self, request: Request) -> Growth | None:
        before = self.record_of(request)
        new_pages = before is None or before.pages_at == NOWHERE
        tokens, salt = request.tokens[: self.depth(request)], request.source.cache_salt
        record = self._store.add(tokens, request.hashes, salt, Kind.PROMPT)
        if record is None:
            return None
        record.partial, record.tag = True, request.source.tag
        for one in record.chain():
            one.busy += 1
        found = Growth(record, [request.source.hand_over], new_pages, record.first)
        self._growths[record.key] = found
        return found

    def record_of(self, request: Request) -> ColdRecord | None:
        """The record of a prompt that is handed over, if the store has one of exactly that."""
        return self._find(request, self.depth(request))

    def growth_of(self, record: ColdRecord) -> Growth | None:
        """That of a record, whoever's prompt it is."""
        return self._growths.get(record.key)

    @property
    def growths(self) -> list[Growth]:
        """Those that are under way."""
        return list(self._growths.values())

    def forget_growth(self, request: Request) -> Growth | None:
        """Its prompt is computed, or will not be."""
        return self._growing.pop(request.id, None)

    def forget_growths(self) -> None:
        """The cache is cleared: prompts that are computed now begin anew."""
        self._growing.clear()

    def end_growth(self, growth: Growth) -> None:
        """The record is whole, or never will be."""
        record = growth.record
        del self._growths[record.key]
        record.partial = False
        if growth.why:
            if growth.new_pages:
                self._store.forget_pages(record)
            self._store.forget_state(record)
        for one in record.chain():
            one.busy -= 1
        self._store.settle(record)

    def offered(self, record: ColdRecord, name: str, ready: int = -1) -> RecordMove:
        """A record in the host's memory. ready: as in `RecordMove`."""
        chain = record.chain()
        pages = [
            HostPages(one.pages_at, one.own_pages, 0, self._end(one, record) - one.first)
            for one in chain
            if self._end(one, record) > one.first
        ]
        state_at = self._state_at(record)
        return RecordMove(name, 0, pages, state_at, self._limits.lease, ready=ready)

    def refused(self, name: str, why: str) -> RecordMove:
        """Word for whoever asks for a record that is not offered after all."""
        self._count(sent_failed=1)
        return RecordMove(name, 0, [], NOWHERE, self._limits.lease, refused=why)

    def sent(self, end: TransferEnd) -> None:
        """It was taken, or its lease has ended."""
        if end.succeeded:
            self._count(sent=1, sent_pages=end.pages, sent_bytes=end.bytes)
        else:
            self._count(sent_failed=1)

    def _end(self, one: ColdRecord, record: ColdRecord) -> int:
        """The page behind the last one that a record of a chain has for it."""
        return one.first + one.own_pages if one is record else one.whole

    def _state_at(self, record: ColdRecord) -> int:
        return record.state_at if self._store.sizes.state else NOWHERE

    # --- records that come --------------------------------------------------------------------

    def expect(self, request: Request) -> None:
        """The request waits for its record."""
        request.loading = True
        self._expected.append(request)

    def next(self, waits: bool) -> Receiving | None:
        """The next record to bring. waits: whether memory may become free, so that one without
        room waits for it."""
        while self._expected:
            request = self._expected[0]
            if request.phase is not Phase.WAITING or self._joins(request):
                self._expected.popleft()
            elif self._is_here(request):
                self._count(local=1)
                self._expected.popleft()
                self._go_on(request)
            elif (begun := self._begin(request)) is not None:
                self._expected.popleft()
                return begun
            elif waits:
                return None
            else:
                self._expected.popleft()
                self.failed(request, NO_ROOM)
        return None

    def _joins(self, request: Request) -> bool:
        """Whether its record comes already, for another request."""
        found = self._found(request)
        if found is None or found.key not in self._joined:
            return False
        self._joined[found.key].append(request)
        return True

    def _is_here(self, request: Request) -> bool:
        """Whether its record is on the device, or in a lower tier."""
        count, salt = request.expected, request.source.cache_salt
        if self._policy.cached(request.tokens[: count + 1], salt) >= count:
            return True
        found = self._found(request)
        if found is None or not found.has_state:
            return False
        self._keep(request, found)
        return True

    def _found(self, request: Request) -> ColdRecord | None:
        """The record that it waits for, if the store has one of exactly these tokens."""
        return self._find(request, request.expected)

    def _find(self, request: Request, length: int) -> ColdRecord | None:
        size, salt = self._store.sizes.page_size, request.source.cache_salt
        request.hashes = page_hashes(request.tokens, size, salt, request.hashes)
        whole = length // size
        return self._store.find(request.hashes[whole], tuple(request.tokens[whole * size : length]))

    def _begin(self, request: Request) -> Receiving | None:
        """None: there is no memory for it."""
        source, salt = request.source.source, request.source.cache_salt
        assert source is not None
        before = self._found(request)
        new_pages = before is None or before.pages_at == NOWHERE
        tokens = request.tokens[: request.expected]
        record = self._store.add(tokens, request.hashes, salt, Kind.PROMPT)
        if record is None:
            return None
        self._joined[record.key] = []
        record.partial, record.tag = True, request.source.tag
        own = record.own_pages if new_pages else 0
        first = record.first if new_pages else record.first + record.own_pages
        pages = [HostPages(record.pages_at, own, 0, own)] if own else []
        state = self._state_at(record)
        move = RecordMove(source.name, first, pages, state, RECEIVE_SECONDS, source)
        return Receiving(request, record, move, new_pages)

    def received(self, request: Request, record: ColdRecord, end: TransferEnd) -> None:
        """It is here, and stays until the request is admitted."""
        self._count(
            received=1,
            received_pages=end.pages,
            received_bytes=end.bytes,
            seconds=end.seconds,
        )
        record.partial = False
        for one in [request, *self._joined.pop(record.key)]:
            if one.phase is Phase.WAITING:
                self._go_on(one)
                self._keep(one, record)

    def lost(self, request: Request, record: ColdRecord, why: str) -> None:
        """It did not come whole. Others that waited for it ask for it themselves."""
        record.partial = False
        self._expected.extendleft(reversed(self._joined.pop(record.key)))
        self.failed(request, why)

    def failed(self, request: Request, why: str) -> None:
        """It does not come: the request fails, or computes its prompt if it may."""
        self._count(received_failed=1)
        self._go_on(request)
        if self._limits.recompute:
            request.expected = 0
        elif request.phase is Phase.WAITING:
            self.failures.append((request, why))

    def has_record_of(self, request: Request) -> bool:
        """Whether the request's record came from another engine, and waits for its admission."""
        return request.id in self._kept

    def released(self, request: Request) -> None:
        """The request has been admitted, or is gone."""
        if (record := self._kept.pop(request.id, None)) is not None:
            record.busy -= 1
            self._store.settle(record)

    def _keep(self, request: Request, record: ColdRecord) -> None:
        record.busy += 1
        self._kept[request.id] = record

    def _go_on(self, request: Request) -> None:
        request.loading = False
        request.estimate_version = -1

    # --- queries ------------------------------------------------------------------------------

    def stats(self, offered: int) -> TransferStats:
        """offered: records that are open to others now."""
        return msgspec.structs.replace(self._totals, open=offered)

    def _count(self, **more: float) -> None:
        """Add to the totals."""
        sums = {name: getattr(self._totals, name) + value for name, value in more.items()}
        self._totals = msgspec.structs.replace(self._totals, **sums)
