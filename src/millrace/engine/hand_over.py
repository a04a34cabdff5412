"""Records that go to other engines, and that come from them: whose they are, and where they lie.

The record of a prompt that is computed here lies in the host's memory, where another engine takes
it by its name, until its lease ends. The other way round, a request whose prompt was computed
elsewhere waits until its record is here; it never computes that part itself unless it is told to.
This module moves nothing, and starts nothing: `TierTransfers` does, with what is made here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import msgspec

from millrace.engine.cache.cold_store import NOWHERE, ColdRecord, ColdStore, page_hashes
from millrace.engine.cache.policy import CachePolicy, Kind
from millrace.engine.request import Phase, Request
from millrace.protocol import HostPages, Limits, RecordMove, TransferEnd, TransferStats

RECEIVE_SECONDS = 30.0  # most that a record may take to come
NO_ROOM = "the host's memory has no room for the record; raise --host-cache-gb"


@dataclass(frozen=True, slots=True)
class Receiving:
    """A record that begins to come. new_pages: whether the memory of its pages was taken for it."""

    request: Request
    record: ColdRecord
    move: RecordMove
    new_pages: bool


class HandOvers:
    """The hand-overs of one replica. failures: requests whose records did not come, and why."""

    def __init__(self, limits: Limits, store: ColdStore, policy: CachePolicy) -> None:
        self._limits, self._store, self._policy = limits, store, policy
        self._expected: deque[Request] = deque()
        self._kept: dict[str, ColdRecord] = {}  # by request, until it is admitted
        self._joined: dict[str, list[Request]] = {}  # by a record's key, while it comes
        self.failures: list[tuple[Request, str]] = []
        self._totals = TransferStats()

    @property
    def has_work(self) -> bool:
        return bool(self._expected or self.failures)

    def depth(self, request: Request) -> int:
        """Tokens of the record of a prompt, and of what it resumes with: all but the last, which
        gives the first logits; of prefixes that are their pages, whole pages."""
        length = request.prompt_len + len(request.source.resume)
        if self._limits.cache_policy == "page":
            return (length - 1) // self._limits.page_size * self._limits.page_size
        return length - 1

    # --- records that go ----------------------------------------------------------------------

    def offered(self, record: ColdRecord, name: str) -> RecordMove:
        """All of a record that is in the host's memory."""
        chain = record.chain()
        pages = [
            HostPages(one.pages_at, one.own_pages, 0, self._end(one, record) - one.first)
            for one in chain
            if self._end(one, record) > one.first
        ]
        return RecordMove(name, 0, pages, self._state_at(record), self._limits.lease)

    def refused(self, name: str, why: str) -> RecordMove:
        """Word for whoever asks for a record that is not offered after all. It counts as one that
        was not sent once that word has ended."""
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
        """Its record, if the store has one of exactly these tokens."""
        size, salt = self._store.sizes.page_size, request.source.cache_salt
        request.hashes = page_hashes(request.tokens, size, salt, request.hashes)
        whole = request.expected // size
        tail = tuple(request.tokens[whole * size : request.expected])
        return self._store.find(request.hashes[whole], tail)

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
        record.tag = request.source.tag
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
        for one in [request, *self._joined.pop(record.key)]:
            if one.phase is Phase.WAITING:
                self._go_on(one)
                self._keep(one, record)

    def lost(self, request: Request, record: ColdRecord, why: str) -> None:
        """It did not come whole. Others that waited for it ask for it themselves."""
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
