"""A worker that computes nothing: it takes the time that a step model says, and invents tokens.

What it knows of a slot is what a device knows: its length, and where its request ends. How many
drafts are accepted is drawn from a seed. It does not know what a step costs; that is the step
model's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from random import Random

from millrace.model.work import StepShape
from millrace.protocol import (
    Admission,
    Masks,
    RecordMove,
    StepPlan,
    StepResult,
    Transfer,
    TransferEnd,
)
from millrace.simulate.common.options import Speeds, StepTime
from millrace.simulate.events.record_links import RecordLinks

END_TOKEN = 0  # ends a request whose text ends before its max_tokens
FIRST_WORD = 1
_OFFER_SECONDS = 10.0  # that a record may be asked for before it is whole
_TRANSFER_LATENCY = 50e-6  # seconds of a transfer between tiers besides its bytes


class HostTime:
    """The moment that the thread of one engine has reached, on the virtual clock."""

    __slots__ = ("moment",)

    def __init__(self) -> None:
        self.moment = 0.0

    def now(self) -> float:
        return self.moment

    def spend(self, seconds: float) -> None:
        """The thread is busy, or sleeps, for so long."""
        self.moment += seconds

    def wait_until(self, moment: float) -> None:
        """The thread waits, if that moment has not passed."""
        self.moment = max(self.moment, moment)


class _Launched:
    """A launched step: its result, and when it is there."""

    __slots__ = ("_ready", "_result", "_thread")

    def __init__(self, thread: HostTime, ready: float, result: StepResult) -> None:
        self._thread, self._ready, self._result = thread, ready, result

    def result(self) -> StepResult:
        self._thread.wait_until(self._ready)
        return self._result


class _Row:
    """A slot: tokens that are known, those after which its request ends, the same by max_tokens."""

    __slots__ = ("end", "length", "most")

    def __init__(self, length: int, most: int, end: int) -> None:
        self.length, self.most, self.end = length, most, end


class SimulatedWorker:
    """Runs plans in virtual time. thread: of its engine. width: 1 + drafts.

    lengths: by the seed of a request, the total length at which its text ends; others end by
    their max_tokens. page_bytes, snapshot_bytes: for transfers between tiers. links: to other
    replicas, where they hand records over; replica: which one this is.
    """

    def __init__(
        self,
        thread: HostTime,
        model: StepTime,
        speeds: Speeds,
        *,
        width: int,
        lengths: Mapping[int, int],
        seed: int,
        page_bytes: int = 0,
        snapshot_bytes: int = 0,
        links: RecordLinks | None = None,
        replica: int = 0,
    ) -> None:
        self._links, self._replica = links, replica
        self._sending: dict[int, tuple[str, float]] = {}  # until when
        self._thread, self._model, self._speeds = thread, model, speeds
        self._width = width
        self._lengths = lengths
        self._page_bytes, self._snapshot_bytes = page_bytes, snapshot_bytes
        self._random = Random(seed)
        self._rows: dict[int, _Row] = {}
        self._device_free = 0.0
        self._link_free = 0.0
        self._transfers: list[tuple[float, int]] = []
        self._receiving: list[tuple[int, str, float]] = []  # until when they are waited for
        self.launched = 0  # steps
        self.busy = 0.0  # seconds of all steps, those that run included

    def launch(self, plan: StepPlan, masks: Callable[[], Masks] | None = None) -> _Launched:
        for admission in plan.admissions:
            self._rows[admission.slot] = self._row(admission)
        # The model's host seconds are those that the device waits for: they are not hidden.
        seconds = float(sum(self._model.times(self._shape(plan))))
        if self._speeds.jitter:
            seconds *= math.exp(self._random.gauss(0.0, self._speeds.jitter))
        self._device_free = max(self._device_free, self._thread.moment) + seconds
        self.busy += seconds
        self.launched += 1
        for transfer in plan.transfers:
            self._transfer(transfer)
        slots, tokens = [], []
        for slot in plan.decode:
            slots.append(slot)
            tokens.append(self._emit(self._rows[slot], 1 + self._accepted(self._drafts(plan))))
        for chunk in plan.chunks:
            if chunk.last:
                slots.append(chunk.slot)
                tokens.append(self._emit(self._rows[chunk.slot], 1))
        return _Launched(self._thread, self._device_free, StepResult(plan.step, slots, tokens))

    def finished(self) -> list[TransferEnd]:
        """Transfers that have ended by now; all of them succeed."""
        now = self._thread.moment
        ended = [TransferEnd(number, True) for moment, number in self._transfers if moment <= now]
        self._transfers = [one for one in self._transfers if one[0] > now]
        return [*ended, *self._received(now), *self._sent(now)]

    def _received(self, now: float) -> list[TransferEnd]:
        """Begin to take the records that are whole by now. Returns the ends of those that will not
        be."""
        lost, waiting = [], self._receiving
        self._receiving = []
        for number, name, until in waiting:
            assert self._links is not None
            if (found := self._links.take(name, now)) is not None:
                self._transfers.append((found[0], number))
            elif now > until or self._links.is_gone(name):
                lost.append(TransferEnd(number, False, "it is not there"))
            else:
                self._receiving.append((number, name, until))
        return lost

    def _sent(self, now: float) -> list[TransferEnd]:
        """Records that others have taken, or whose leases have ended."""
        found = []
        for number, (name, until) in list(self._sending.items()):
            assert self._links is not None
            taken = self._links.was_taken(name, now)
            if taken or now > until:
                self._links.withdraw(name)
                del self._sending[number]
                found.append(TransferEnd(number, taken))
        return found

    def close(self) -> None:
        pass

    def _row(self, admission: Admission) -> _Row:
        most = admission.max_total
        end = min(most, self._lengths.get(admission.seed, most))
        return _Row(len(admission.tokens), most, end)

    def _shape(self, plan: StepPlan) -> StepShape:
        rows, chunks = self._rows, plan.chunks
        return StepShape(
            decode_rows=float(len(plan.decode)),
            decode_tokens=float(len(plan.decode) * (1 + self._drafts(plan))),
            decode_context=float(sum([rows[slot].length for slot in plan.decode])),
            prompts=float(len(chunks)),
            prompt_tokens=float(sum([c.count for c in chunks])),
            prompt_context=float(sum([c.start for c in chunks])),
            prompt_attention=float(sum([c.count * (c.start + c.count / 2) for c in chunks])),
            sampled_rows=float(len(plan.decode) + sum([c.last for c in chunks])),
        )

    def _drafts(self, plan: StepPlan) -> int:
        """Drafts of each decode row; the engine may have chosen fewer for this step."""
        return self._width - 1 if plan.drafts < 0 else plan.drafts

    def _accepted(self, drafts: int) -> int:
        """Drafts of one row that are accepted."""
        count = 0
        for chance in self._speeds.acceptance[:drafts]:
            if self._random.random() >= chance:
                break
            count += 1
        return count

    def _emit(self, row: _Row, count: int) -> list[int]:
        """New tokens of a row; none once it has ended."""
        count = min(count, row.end - row.length)
        if count <= 0:
            return []
        first = row.length
        row.length += count
        made = [FIRST_WORD + (first + n) * 7919 % 30_011 for n in range(count)]
        if row.length == row.end < row.most:
            made[-1] = END_TOKEN
        return made

    def _transfer(self, transfer: Transfer) -> None:
        if transfer.record is not None:
            self._move(transfer, transfer.record)
            return
        size = sum(
            len(move.pages) * self._page_bytes + (move.snapshot >= 0) * self._snapshot_bytes
            for move in transfer.moves
        )
        speed = self._speeds.host_copy
        if transfer.kind in ("store", "fetch"):
            size = sum(file.pages_bytes + file.state_bytes for file in transfer.files)
            speed = self._speeds.disk_copy
        self._link_free = max(self._link_free, self._thread.moment) + _TRANSFER_LATENCY
        self._link_free += size / speed
        self._transfers.append((self._link_free, transfer.id))

    def _move(self, transfer: Transfer, record: RecordMove) -> None:
        """A record, to another replica or from one."""
        assert self._links is not None
        now, name = self._thread.moment, record.name
        if transfer.kind == "receive":
            self._receiving.append((transfer.id, name, now + _OFFER_SECONDS))
            return
        if transfer.kind == "grow":
            self._transfers.append((now, transfer.id))
        if record.refused:
            self._links.withdraw(name)
            return
        if transfer.kind == "send":
            self._sending[transfer.id] = name, now + record.seconds
        whole = record.ready < 0
        pages = sum(part.end - part.first for part in record.pages) if whole else record.ready
        self._links.offer(self._replica, name, pages, whole, now)
