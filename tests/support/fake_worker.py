"""A worker of plain arithmetic that checks every plan it is given.

Its model is a function of the whole prefix, so any mix-up of pages, slots, snapshots or lengths
changes the tokens or trips an assertion: each page row holds a tag of the prefix that wrote it, and
every row of a step checks the tags of all positions before it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from millrace.protocol import (
    Admission,
    FileMove,
    FoundFile,
    Masks,
    RecordMove,
    StepPlan,
    StepResult,
    Transfer,
    TransferEnd,
)

VOCAB = 50
EOS = 0
_MOD = (1 << 61) - 1


def extend_tag(tag: int, token: int) -> int:
    return (tag * 1_000_003 + token + 17) % _MOD


def tag_of(tokens: list[int]) -> int:
    tag = 1
    for token in tokens:
        tag = extend_tag(tag, token)
    return tag


def next_token(tag: int) -> int:
    """The model: a token from the prefix's tag; EOS about once in 50."""
    return (tag >> 7) % VOCAB


def expected_output(prompt: list[int], max_total: int, eos: frozenset[int]) -> list[int]:
    """The tokens that any correct engine brings for this prompt."""
    tag, out = tag_of(prompt), list[int]()
    while len(prompt) + len(out) < max_total:
        token = next_token(tag)
        out.append(token)
        tag = extend_tag(tag, token)
        if token in eos:
            break
    return out


@dataclass
class _Row:
    """A slot: its known tokens, the tag before each position, how many are in the caches."""

    tokens: list[int]
    length: int
    max_total: int
    stops: frozenset[int]
    ended: bool = False
    pages: list[int] = field(default_factory=list)


@dataclass
class FakePending:
    value: StepResult

    def result(self) -> StepResult:
        return self.value


class FakeNetwork:
    """Records that workers offer each other: name -> (pages' tags, state). Those in `broken` do
    not arrive. A state of None: the rest is computed; gone: those that nobody can take any more."""

    def __init__(self) -> None:
        self.records: dict[str, tuple[list[dict[int, int]], list[int] | None]] = {}
        self.gone: set[str] = set()
        self.taken: set[str] = set()
        self.broken: set[str] = set()


class FakeWorker:
    """See the module. `seed` drives how many drafts are accepted. network: where records go to."""

    def __init__(
        self,
        page_size: int,
        drafts: int,
        max_tokens: int,
        *,
        seed: int = 0,
        checks: bool = True,
        policy: str = "snapshot",
        network: FakeNetwork | None = None,
    ) -> None:
        self._network = network or FakeNetwork()
        self._sending: dict[int, str] = {}
        self._receiving: list[tuple[int, RecordMove]] = []
        self._policy = policy
        self._page_size = page_size
        self._width = drafts + 1
        self._max_tokens = max_tokens
        self._rng = random.Random(seed)
        self._rows: dict[int, _Row] = {}
        self._memory: dict[tuple[int, int], int] = {}
        self._snapshots: dict[int, list[int]] = {}
        self._checks = checks
        self._host: dict[tuple[int, int, int], int] = {}
        self._host_states: dict[int, list[int]] = {}
        self._transfers: list[TransferEnd] = []
        self.files: dict[tuple[str, str], Any] = {}
        self.damaged: set[str] = set()
        self.plans: list[StepPlan] = []

    def launch(self, plan: StepPlan, masks: Callable[[], Masks] | None = None) -> FakePending:
        self.plans.append(plan)
        used = len(plan.decode) * self._width + sum(c.count for c in plan.chunks)
        assert used <= self._max_tokens
        assert used or plan.ends or plan.transfers or plan.deletes
        named = plan.decode + [c.slot for c in plan.chunks]
        assert len(set(named)) == len(named), "a slot runs once a step"
        for save in plan.ends:
            row = self._rows[save.slot]
            # It has ended, or its prompt was given up before all of it was computed.
            assert row.length < len(row.tokens)
            assert not row.ended or row.length == len(row.tokens) - 1
            self._snapshots[save.snapshot] = row.tokens[: row.length]
        for transfer in plan.transfers:
            self._transfer(transfer)
        for key, pages in plan.deletes:
            self.files.pop((key, "state"), None)
            if pages:
                self.files.pop((key, "pages"), None)
        for admission in plan.admissions:
            self._admit(admission)
        for grant in plan.grants:
            row = self._rows[grant.slot]
            assert len(row.pages) == grant.first
            assert 0 not in grant.pages
            row.pages += grant.pages
        for copy in plan.copies:
            for at in range(self._page_size):
                self._memory[copy.target, at] = self._memory.get((copy.source, at), -1)
        slots, tokens = [], []
        for slot in plan.decode:
            slots.append(slot)
            tokens.append(self._verify(slot))
        for chunk in plan.chunks:
            row = self._rows[chunk.slot]
            assert row.length == chunk.start
            assert chunk.count > 0
            self._compute(row, chunk.count)
            row.length += chunk.count
            if chunk.last:
                assert row.length == len(row.tokens)
                slots.append(chunk.slot)
                tokens.append(self._emit(row, 1))
        for save in plan.saves:
            row = self._rows[save.slot]
            self._snapshots[save.snapshot] = row.tokens[: row.length]
        return FakePending(StepResult(plan.step, slots, tokens))

    def close(self) -> None:
        pass

    # --- lower tiers ------------------------------------------------------------------------

    def finished(self) -> list[TransferEnd]:
        """Some of the transfers that were started, after a while."""
        self._receiving = [one for one in self._receiving if not self._receive(*one)]
        ended = [one for one in self._transfers if self._rng.random() < 0.5]
        self._transfers = [one for one in self._transfers if one not in ended]
        taken = [number for number, name in self._sending.items() if name in self._network.taken]
        for number in taken:
            name = self._sending.pop(number)
            self._network.records.pop(name, None)
            self._network.gone.add(name)
        return ended + [TransferEnd(number, True, bytes=1) for number in taken]

    def expire_leases(self) -> None:
        """Nobody takes what is offered."""
        for number, name in list(self._sending.items()):
            _, state = self._network.records.get(name, ([], []))
            if state is not None:
                self._network.records.pop(name, None)
                self._network.gone.add(name)
                self._end_send(number)

    def _end_send(self, number: int) -> None:
        del self._sending[number]
        self._transfers.append(TransferEnd(number, False))

    def _transfer(self, transfer: Transfer) -> None:
        """Everything is copied at once, and reported later. A range in the host's memory is known
        by where it begins."""
        if transfer.record is not None:
            if transfer.kind == "receive":
                self._receiving.append((transfer.id, transfer.record))
            else:
                self._hand_over(transfer, transfer.record)
            return
        succeeded = True
        for move in transfer.moves:
            for index, page in enumerate(move.pages, move.first):
                for at in range(self._page_size):
                    place = (move.pages_at, index, at)
                    if transfer.kind == "offload":
                        self._host[place] = self._memory.get((page, at), -1)
                    else:
                        self._memory[page, at] = self._host[place]
            if move.snapshot >= 0 and transfer.kind == "offload":
                self._host_states[move.state_at] = self._snapshots[move.snapshot]
            elif move.snapshot >= 0:
                self._snapshots[move.snapshot] = self._host_states[move.state_at]
        for file in transfer.files:
            succeeded &= self._file(transfer.kind, file)
        self._transfers.append(TransferEnd(transfer.id, succeeded))

    def _hand_over(self, transfer: Transfer, move: RecordMove) -> None:
        """Offer a record, or more of it. What was offered once is not read again."""
        records, name = self._network.records, move.name
        if transfer.kind == "send":
            self._sending[transfer.id] = name
            records[name] = [], None
        else:
            self._transfers.append(TransferEnd(transfer.id, True))
        if name not in records:  # nobody can take it any more
            return
        if move.refused:
            del records[name]
            self._network.gone.add(name)
            for number in [n for n, one in self._sending.items() if one == name]:
                self._end_send(number)
            return
        before, _ = records[name]
        places = _places(move, self._page_size)
        places = places if move.ready < 0 else places[: move.ready]
        assert len(places) >= len(before), "a record grows"
        fresh = [{at: self._host[p] for at, p in one.items()} for one in places[len(before) :]]
        state = self._host_states.get(move.state_at, []) if move.ready < 0 else None
        records[name] = [*before, *fresh], state

    def _receive(self, number: int, move: RecordMove) -> bool:
        """Whether a record is here, or will never be."""
        assert move.source is not None
        found = self._network.records.get(move.name)
        early = not move.source.tokens and move.name not in self._network.gone
        if move.name in self._network.broken or (found is None and not early):
            self._transfers.append(TransferEnd(number, False, "it is not there"))
            return True
        if found is None or found[1] is None:
            return False
        pages = found[0]
        places = _places(move, self._page_size)
        for page, place in zip(pages[move.first :], places, strict=True):
            for at, p in place.items():
                self._host[p] = page[at]
        self._host_states[move.state_at] = found[1]
        self._network.taken.add(move.name)
        self._transfers.append(TransferEnd(number, True, bytes=1, pages=len(places)))
        return True

    def _file(self, kind: str, file: FileMove) -> bool:
        if kind == "store":
            pages = {p[1:]: tag for p, tag in self._host.items() if p[0] == file.pages_at}
            self.files[file.key, "pages"] = (pages, file)
            if file.state_at >= 0:
                self.files[file.key, "state"] = (self._host_states[file.state_at], file)
            return True
        if file.pages_at >= 0:
            if (file.key, "pages") not in self.files or file.key in self.damaged:
                return False
            for place, tag in self.files[file.key, "pages"][0].items():
                self._host[file.pages_at, *place] = tag
        if file.state_at >= 0:
            if (file.key, "state") not in self.files:
                return False
            self._host_states[file.state_at] = self.files[file.key, "state"][0]
        return True

    def found(self) -> dict[str, FoundFile]:
        """What a later process finds."""
        return {
            key: FoundFile(
                file.parent, file.first, file.tokens, file.salt, file.kind,
                (key, "state") in self.files, float(number),
            )
            for number, ((key, part), (_, file)) in enumerate(self.files.items())
            if part == "pages"
        }  # fmt: skip

    def _admit(self, a: Admission) -> None:
        if a.snapshot >= 0:
            assert 0 < a.start < len(a.tokens)
            assert self._snapshots[a.snapshot] == a.tokens[: a.start], "snapshot of another prefix"
        else:
            assert a.start == 0 or self._policy == "page"
            assert a.start % self._page_size == 0
        self._rows[a.slot] = _Row(list(a.tokens), a.start, a.max_total, frozenset(a.stop_token_ids))

    def _verify(self, slot: int) -> list[int]:
        row = self._rows[slot]
        if row.ended:
            return []
        assert row.length == len(row.tokens) - 1
        count = self._rng.randint(1, self._width)
        self._compute(row, 1)
        fresh = self._emit(row, count)
        row.length += len(fresh)
        for position in range(len(row.tokens) - len(fresh), row.length):
            self._store(row, position)
        for position in range(row.length, min(row.length + self._width, row.max_total)):
            self._store(row, position, tag=-1)  # rejected drafts leave garbage behind
        return fresh

    def _emit(self, row: _Row, count: int) -> list[int]:
        tag, fresh = tag_of(row.tokens), list[int]()
        while len(fresh) < count and not row.ended:
            token = next_token(tag)
            tag = extend_tag(tag, token)
            fresh.append(token)
            row.tokens.append(token)
            row.ended = token in row.stops or len(row.tokens) >= row.max_total
        return fresh

    def _compute(self, row: _Row, count: int) -> None:
        """Check all that the new tokens attend to, then store them."""
        if not self._checks:
            return
        tag = 1
        for position in range(row.length):
            tag = extend_tag(tag, row.tokens[position])
            assert self._memory.get(self._place(row, position)) == tag, f"page row {position}"
        for position in range(row.length, row.length + count):
            self._store(row, position)

    def _store(self, row: _Row, position: int, tag: int | None = None) -> None:
        if self._checks and position // self._page_size < len(row.pages):
            value = tag_of(row.tokens[: position + 1]) if tag is None else tag
            self._memory[self._place(row, position)] = value

    def _place(self, row: _Row, position: int) -> tuple[int, int]:
        return row.pages[position // self._page_size], position % self._page_size


def _places(move: RecordMove, page_size: int) -> list[dict[int, tuple[int, int, int]]]:
    """Of each page of a record, where its rows are in the host's memory."""
    return [
        {at: (part.at, index, at) for at in range(page_size)}
        for part in move.pages
        for index in range(part.first, part.end)
    ]
