"""Prefixes in lower tiers: in the host's memory, and in files. What is where, and what goes.

A *cold record* is a prefix of a sequence with the state at its end. Records form chains: a record
has only the pages behind those of its parent, so the turns of a conversation share what they have
in common. A record is found by a hash of all tokens before it, and of its salt. Its pages and its
state may be in memory, in files, in both; pages that another record continues are kept somewhere.
A long record's beginning is made records without a state, so that it fits where memory is in
pieces.

It is bookkeeping: it names ranges of memory and files, and moves nothing. It knows no device.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from millrace.engine.cache.policy import Kind
from millrace.engine.cache.prefix_tiers import PrefixTiers, Tier
from millrace.engine.cache.ranges import Ranges
from millrace.engine.cache.tree import TOKEN_BYTES, packed
from millrace.protocol import FileMove, FoundFile

NOWHERE = -1
PART_BYTES = 256 << 20  # of pages: what a longer record has more is cut off, from its beginning on


@dataclass(frozen=True, slots=True)
class ColdSizes:
    """page, state: bytes of a page and of a state. host, disk: bytes of the tiers; 0: none."""

    page_size: int
    page: int
    state: int
    host: int
    disk: int


@dataclass(eq=False, slots=True)
class ColdRecord:
    """See the module.

    prefix: hash of its whole pages; whole: how many. tail: tokens behind them. first: the first
    page that it has itself. tokens: of its own pages. pages_at, state_at: where they are in the
    host's memory. files: whether its pages and its state are in files. busy: transfers that use it.
    tag: of the request that it was made for. partial: it is still coming to the host's memory,
    piece by piece, so nobody may use it, nor continue it.
    """

    key: str
    prefix: bytes
    whole: int
    tail: tuple[int, ...]
    first: int
    tokens: list[int]
    salt: str
    kind: Kind
    parent: ColdRecord | None
    children: dict[str, ColdRecord] = field(default_factory=dict)
    pages_at: int = NOWHERE
    state_at: int = NOWHERE
    pages_filed: bool = False
    state_filed: bool = False
    busy: int = 0
    order: int = 0
    tag: int = 0
    partial: bool = False

    @property
    def own_pages(self) -> int:
        return self.whole - self.first + bool(self.tail)

    @property
    def has_state(self) -> bool:
        return not self.partial and (self.state_at != NOWHERE or self.state_filed)

    def chain(self) -> list[ColdRecord]:
        """The records whose pages it needs, the longest last."""
        found: list[ColdRecord] = []
        at: ColdRecord | None = self
        while at is not None:
            found.append(at)
            at = at.parent
        return found[::-1]


def page_hashes(
    tokens: Sequence[int], page_size: int, salt: str, known: Sequence[bytes] = ()
) -> list[bytes]:
    """The hash before the first page, and behind each whole page. known: of a sequence that begins
    with these tokens, or that these begin with, and of the same salt."""
    count = len(tokens) // page_size
    found = list(known[: count + 1]) or [blake2b(salt.encode(), digest_size=16).digest()]
    first = len(found) - 1
    data, step = memoryview(packed(tokens[first * page_size :])), TOKEN_BYTES * page_size
    for start in range(0, (count - first) * step, step):
        hasher = blake2b(found[-1], digest_size=16)
        hasher.update(data[start : start + step])
        found.append(hasher.digest())
    return found


class ColdStore:
    """The records of one replica. deletes: keys of records whose files are to be deleted."""

    def __init__(self, sizes: ColdSizes, prefix_tiers: PrefixTiers | None = None) -> None:
        self.sizes = sizes
        self._tiers = prefix_tiers or PrefixTiers()
        self._ranges = Ranges(sizes.host)
        self._records: dict[str, ColdRecord] = {}
        self._by_prefix: dict[bytes, dict[tuple[int, ...], ColdRecord]] = {}
        self._order = 0
        self.disk_used = 0
        self.deletes: list[tuple[str, bool]] = []  # (key, whether its pages go, too)
        self._broken: list[ColdRecord] = []  # what they need is gone, but a transfer uses them

    @property
    def host_used(self) -> int:
        return self._ranges.used

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    # --- lookup -----------------------------------------------------------------------------

    def depth(self, record: ColdRecord) -> int:
        """Tokens that it covers."""
        return record.whole * self.sizes.page_size + len(record.tail)

    def match(self, tokens: Sequence[int], hashes: Sequence[bytes]) -> ColdRecord | None:
        """The longest record that the tokens begin with, and go on behind."""
        size = self.sizes.page_size
        for whole in range(min(len(hashes) - 1, (len(tokens) - 1) // size), -1, -1):
            beside = self._by_prefix.get(hashes[whole])
            if beside is None:
                continue
            rest = tuple(tokens[whole * size : min((whole + 1) * size, len(tokens) - 1)])
            fitting = [
                record
                for tail, record in beside.items()
                if record.has_state and rest[: len(tail)] == tail and _is_whole(record)
            ]
            if fitting:
                return max(fitting, key=lambda record: len(record.tail))
        return None

    def find(self, prefix: bytes, tail: tuple[int, ...]) -> ColdRecord | None:
        return self._by_prefix.get(prefix, {}).get(tail)

    def touch(self, record: ColdRecord) -> None:
        """It is used, and so is what it needs."""
        for one in record.chain():
            self._order += 1
            one.order = self._order

    # --- insertion --------------------------------------------------------------------------

    def add(
        self, tokens: Sequence[int], hashes: Sequence[bytes], salt: str, kind: Kind
    ) -> ColdRecord | None:
        """A record of these tokens, with memory for its own pages and its state, which are to be
        written there. None: there is no memory, or the record is there already."""
        broken, self._broken = self._broken, []
        for record in broken:
            self._remove_branch(record)
        whole = len(tokens) // self.sizes.page_size
        tail = tuple(tokens[whole * self.sizes.page_size :])
        found = self.find(hashes[whole], tail)
        if found is not None and (found.has_state or found.partial):
            self.touch(found)
            return None
        if found is None:
            found = self._make(tokens, hashes, salt, kind, whole, tail)
        if not self.make_room(found):
            self._remove_if_useless(found)
            return None
        self.touch(found)
        return found

    def add_long(
        self, tokens: Sequence[int], hashes: Sequence[bytes], salt: str, kind: Kind
    ) -> list[ColdRecord]:
        """As `add`, for a record that may be cut: what is to be written, the record itself last;
        nothing where `add` returns None."""
        whole = len(tokens) // self.sizes.page_size
        holder = self._holder(hashes, whole)
        most = max(1, PART_BYTES // self.sizes.page)
        parts: list[ColdRecord] = []
        for end in range((holder.whole if holder else 0) + most, whole, most):
            if self.find(hashes[end], ()) is not None:  # it is on its way
                break
            own = tokens[: end * self.sizes.page_size]
            parts.append(self._make(own, hashes, salt, kind, end, ()))
            parts[-1].busy += 1
        enough = all(self.room_for_pages(part) for part in parts)
        found = self.add(tokens, hashes, salt, kind) if enough else None
        for part in parts:
            part.busy -= 1
        if found is not None:
            return [*parts, found]
        for part in reversed(parts):
            self._remove_if_useless(part)
        return []

    def _make(
        self,
        tokens: Sequence[int],
        hashes: Sequence[bytes],
        salt: str,
        kind: Kind,
        whole: int,
        tail: tuple[int, ...],
    ) -> ColdRecord:
        parent = self._holder(hashes, whole)
        first = parent.whole if parent else 0
        key = blake2b(hashes[whole] + array("i", tail).tobytes(), digest_size=16).hexdigest()
        own = list(tokens[first * self.sizes.page_size :])
        record = ColdRecord(key, hashes[whole], whole, tail, first, own, salt, kind, parent)
        self._insert(record)
        return record

    def _holder(self, hashes: Sequence[bytes], whole: int) -> ColdRecord | None:
        """The record that has the most of so many whole pages."""
        return next((p for n in range(whole, -1, -1) if (p := self._page_holder(hashes[n]))), None)

    def _page_holder(self, prefix: bytes) -> ColdRecord | None:
        """A record that has, with those before it, all whole pages of the prefix."""
        beside = self._by_prefix.get(prefix, {})
        return next((record for record in beside.values() if not record.partial), None)

    def _insert(self, record: ColdRecord) -> None:
        self._records[record.key] = record
        self._by_prefix.setdefault(record.prefix, {})[record.tail] = record
        if record.parent is not None:
            record.parent.children[record.key] = record

    def restore(self, known: Mapping[str, FoundFile]) -> None:
        """The records of files, by their keys: those whose chains are whole."""
        left = sorted(known, key=lambda key: known[key].first)
        while left:  # parents before children; a parent may begin at the same page
            ready = [k for k in left if not known[k].parent or known[k].parent in self._records]
            for key in ready:
                parent = self._records.get(known[key].parent)
                self._restored(key, known[key], parent)
            if not ready:
                break
            left = [key for key in left if key not in self._records]
        self.deletes += ((key, True) for key in left)
        for record in sorted(self._records.values(), key=lambda one: known[one.key].used):
            self._order += 1
            record.order = self._order
            self._remove_if_useless(record)
        self.trim_disk()

    def _restored(self, key: str, file: FoundFile, parent: ColdRecord | None) -> ColdRecord:
        size = self.sizes.page_size
        before = parent.prefix if parent else page_hashes([], size, file.salt)[0]
        count = len(file.tokens) // size * size
        prefix = before
        for start in range(0, count, size):
            hasher = blake2b(prefix, digest_size=16)
            hasher.update(array("i", file.tokens[start : start + size]).tobytes())
            prefix = hasher.digest()
        whole, tail = file.first + count // size, tuple(file.tokens[count:])
        record = ColdRecord(
            key, prefix, whole, tail, file.first, file.tokens, file.salt, Kind(file.kind), parent,
            pages_filed=True, state_filed=file.has_state,
        )  # fmt: skip
        self._insert(record)
        self.disk_used += self._filed_bytes(record)
        return record

    # --- memory -----------------------------------------------------------------------------

    def pages_bytes(self, record: ColdRecord) -> int:
        return record.own_pages * self.sizes.page

    def make_room(self, record: ColdRecord) -> bool:
        """Allocate memory for what of the record is not there. False, and nothing is allocated:
        there is none."""
        record.busy += 1
        had_pages = record.pages_at != NOWHERE
        if not had_pages:
            record.pages_at = self._allocate(self.pages_bytes(record))
        if record.pages_at != NOWHERE and record.state_at == NOWHERE:
            record.state_at = self._allocate(self.sizes.state, last=True)
            if record.state_at == NOWHERE and not had_pages:
                self._ranges.free(record.pages_at)
                record.pages_at = NOWHERE
        record.busy -= 1
        return record.pages_at != NOWHERE and record.state_at != NOWHERE

    def room_for_pages(self, record: ColdRecord) -> bool:
        """The same for its pages alone."""
        if record.pages_at == NOWHERE:
            record.pages_at = self._allocate(self.pages_bytes(record))
        return record.pages_at != NOWHERE

    def forget_pages(self, record: ColdRecord) -> None:
        """Free the memory of its pages, which were not read."""
        self._ranges.free(record.pages_at)
        record.pages_at = NOWHERE

    def forget_state(self, record: ColdRecord) -> None:
        """The same of its state."""
        self._ranges.free(record.state_at)
        record.state_at = NOWHERE

    def _allocate(self, count: int, *, last: bool = False) -> int:
        while (start := self._ranges.allocate(count, last=last)) is None:
            if not self._give_up_memory():
                return NOWHERE
        return start

    def _give_up_memory(self) -> bool:
        """Free memory: first of states that later turns have replaced and what else is in files,
        then of such states that are not, then whole records; the longest unused first."""
        best: tuple[int, int] | None = None
        victim: ColdRecord | None = None
        for record in self._records.values():
            if record.busy or (record.pages_at == NOWHERE and record.state_at == NOWHERE):
                continue
            replaced = record.state_at != NOWHERE and bool(record.children)
            if replaced and record.state_filed:
                rank = 0
            elif record.pages_filed and (record.state_filed or record.state_at == NOWHERE):
                rank = 1
            elif replaced:
                rank = 2
            elif not record.children:
                rank = 3
            else:
                continue
            if best is None or (rank, record.order) < best:
                best, victim = (rank, record.order), record
        if victim is None:
            return False
        assert best is not None
        if best[0] in (0, 2):
            self._ranges.free(victim.state_at)
            victim.state_at = NOWHERE
            return True
        self.drop_memory(victim)
        self._tiers.set(victim.tag, Tier.HOST, there=False)
        self._remove_if_useless(victim)
        return True

    def drop_memory(self, record: ColdRecord) -> None:
        """Free what the record has in memory."""
        for start in (record.pages_at, record.state_at):
            if start != NOWHERE:
                self._ranges.free(start)
        record.pages_at = record.state_at = NOWHERE

    # --- files ------------------------------------------------------------------------------

    def _filed_bytes(self, record: ColdRecord) -> int:
        pages = self.pages_bytes(record) if record.pages_filed else 0
        return pages + (self.sizes.state if record.state_filed else 0)

    def filed(self, record: ColdRecord, state: bool) -> None:
        """Its pages, and its state if that was there, have been written to files."""
        self.disk_used -= self._filed_bytes(record)
        record.pages_filed = True
        record.state_filed |= state
        self.disk_used += self._filed_bytes(record)
        self._tiers.set(record.tag, Tier.DISK, there=record.state_filed)
        self.trim_disk()

    def trim_disk(self) -> None:
        """Give up files until they fit: states that were replaced first, then whole records."""
        while self.disk_used > self.sizes.disk:
            free = [r for r in self._records.values() if not r.busy and r.pages_filed]
            replaced = [r for r in free if r.children and r.state_filed]
            pool = replaced or [r for r in free if self._ends_in_files(r)]
            if not pool:
                return
            victim = min(pool, key=lambda record: record.order)
            self.disk_used -= self._filed_bytes(victim)
            victim.state_filed = False
            victim.pages_filed = bool(replaced)
            self.disk_used += self._filed_bytes(victim)
            self.deletes.append((victim.key, not victim.pages_filed))
            self._remove_if_useless(victim)

    def _ends_in_files(self, record: ColdRecord) -> bool:
        """Whether no file needs those of the record, and nor does what continues it in memory."""
        needed = any(child.pages_filed for child in record.children.values())
        return not needed and (record.pages_at != NOWHERE or not record.children)

    def lost(self, record: ColdRecord) -> None:
        """Its files cannot be read: it and what needs it is gone, unless it is in memory."""
        self.disk_used -= self._filed_bytes(record)
        record.pages_filed = record.state_filed = False
        self.deletes.append((record.key, True))
        if record.pages_at == NOWHERE:
            for child in list(record.children.values()):
                self._remove_branch(child)
        self._remove_if_useless(record)

    def discard(self, record: ColdRecord) -> None:
        """Remove a record that must not be used, if nothing continues or uses it."""
        if self._is_free(record):
            self._remove(record)
            self.settle(record.parent)

    def settle(self, record: ColdRecord | None) -> None:
        """Remove it, and what it continues, as far as nobody can use them any more."""
        if record is not None:
            self._remove_if_useless(record)

    def _remove_branch(self, record: ColdRecord) -> None:
        for child in list(record.children.values()):
            self._remove_branch(child)
        if self._records.get(record.key) is not record:
            return
        if record.busy or record.children:
            self._broken.append(record)
        else:
            self._remove(record)
            self.settle(record.parent)

    # --- removal ----------------------------------------------------------------------------

    def _remove_if_useless(self, record: ColdRecord) -> None:
        """A record that nobody can resume at, and that nobody continues, goes; so may its
        parent."""
        at: ColdRecord | None = record
        while at is not None and self._is_free(at):
            pages = at.pages_at != NOWHERE or at.pages_filed
            if at.has_state and pages:
                return
            parent = at.parent
            self._remove(at)
            at = parent

    def _is_free(self, record: ColdRecord) -> bool:
        """Whether it is there, and nothing uses or continues it."""
        there = self._records.get(record.key) is record
        return there and not record.busy and not record.children

    def _remove(self, record: ColdRecord) -> None:
        self.drop_memory(record)
        self._tiers.set(record.tag, Tier.HOST | Tier.DISK, there=False)
        if record.pages_filed or record.state_filed:
            self.disk_used -= self._filed_bytes(record)
            record.pages_filed = record.state_filed = False
            self.deletes.append((record.key, True))
        del self._records[record.key]
        beside = self._by_prefix[record.prefix]
        del beside[record.tail]
        if not beside:
            del self._by_prefix[record.prefix]
        if record.parent is not None:
            record.parent.children.pop(record.key, None)

    def clear(self) -> None:
        """Remove every record that no transfer uses."""
        while free := [r for r in self._records.values() if not r.busy and not r.children]:
            for record in free:
                self._remove(record)

    # --- integrity --------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        self._ranges.check()
        taken = 0
        for record in self._records.values():
            taken += (record.pages_at != NOWHERE) + (record.state_at != NOWHERE)
            assert record.pages_at != NOWHERE or record.pages_filed or record.busy, "pages"
            assert record.has_state or record.children or record.busy, "a record of no use"
            if record.parent is not None:
                assert self._records[record.parent.key] is record.parent, "parents are there"
                assert record.parent.whole == record.first, "pages follow each other"
        assert taken == self._ranges.count, "memory"
        assert self.disk_used == sum(map(self._filed_bytes, self._records.values())), "disk"


def _is_whole(record: ColdRecord) -> bool:
    """Whether all of its pages are somewhere."""
    return all(one.pages_at != NOWHERE or one.pages_filed for one in record.chain())


def file_move(record: ColdRecord, store: ColdStore, pages: bool, state: bool) -> FileMove:
    """Its files and the memory that they are written from, or read to."""
    return FileMove(
        key=record.key,
        parent=record.parent.key if record.parent else "",
        first=record.first,
        tokens=record.tokens,
        salt=record.salt,
        kind=record.kind.value,
        pages_at=record.pages_at if pages else NOWHERE,
        pages_bytes=store.pages_bytes(record),
        state_at=record.state_at if state else NOWHERE,
        state_bytes=store.sizes.state,
    )
