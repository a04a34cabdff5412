"""Starts the transfers of plans, and says which have ended.

Each rank has its part of every record in its own memory and files. Copies of all ranks are in the
order of their streams, so that rank 0's end counts for all of them. Files and records of other
engines are another matter: a rank's disk may be slower, or full, and its part of a record lost. So
such a transfer has ended once it has on all ranks, which they find out together.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec

from millrace.protocol import FoundFile, RecordMove, StepPlan, Transfer, TransferEnd
from millrace.runtime.tiers.disk_cache import DiskCache
from millrace.runtime.tiers.host_cache import HostCache
from millrace.runtime.transfer.offers import Moved
from millrace.runtime.transfer.peer import Peer

_PENDING, _FAILED, _DONE = range(3)


class Tiers:
    """The tiers below the device of one rank.

    files: None without a disk cache. peer: None where no record goes to other engines. ranks: how
    many there are; mins: the elementwise minimum of all ranks' numbers; await_event: waits for an
    event of the device, not for ever. The last two are for several ranks.
    """

    def __init__(
        self,
        host: HostCache,
        files: DiskCache | None = None,
        peer: Peer | None = None,
        mins: Callable[[list[int]], list[int]] = lambda values: values,
        ranks: int = 1,
        await_event: Callable[[Any], None] = lambda event: None,
    ) -> None:
        self._ranks = ranks
        self._await_event = await_event
        self._host = host
        self.files = files
        self.peer = peer
        self._mins = mins
        self._copies: dict[int, Any] = {}  # by transfer, what it waits for: an event, or nothing
        self._records: dict[int, Future[Moved]] = {}  # of other engines, or for them
        self._common: dict[int, Future[bool] | Future[Moved]] = {}  # that end on all ranks together

    def start(self, plan: StepPlan, wait: bool) -> None:
        """Start a plan's transfers. wait: its steps may read what earlier loads of this rank are
        still bringing, because only rank 0 knows that they have ended there."""
        if wait:
            self._host.wait()
        for transfer in plan.transfers:
            self._begin(transfer)
        if self.files is not None and plan.deletes:
            self.files.delete(plan.deletes)

    def _begin(self, transfer: Transfer) -> None:
        if transfer.kind == "offload":
            self._copies[transfer.id] = self._host.offload(transfer.moves)
        elif transfer.kind == "load":
            self._copies[transfer.id] = self._host.load(transfer.moves)
        elif transfer.kind == "grow":
            self._grow(transfer)
        elif transfer.record is not None:
            self._move(transfer, transfer.record)
        else:
            assert self.files is not None
            act = self.files.store if transfer.kind == "store" else self.files.fetch
            # Copies of the same memory have ended on rank 0, and may not have here.
            self._common[transfer.id] = act(transfer.files, self._host.mark())

    def _grow(self, transfer: Transfer) -> None:
        """Others may take more of a record: what has come to the host's memory since."""
        assert self.peer is not None
        assert transfer.record is not None
        self._await_copies()
        self.peer.grow(transfer.record)
        self._copies[transfer.id] = None  # it has ended

    def _await_copies(self) -> None:
        """Wait for copies that have ended on rank 0 and may not have here."""
        if self._ranks > 1 and (event := self._host.mark()) is not None:
            self._await_event(event)

    def _move(self, transfer: Transfer, record: RecordMove) -> None:
        assert self.peer is not None
        move = self.peer.send if transfer.kind == "send" else self.peer.receive
        if self._ranks == 1:
            self._records[transfer.id] = move(record)
            return
        self._await_copies()
        self._common[transfer.id] = move(record)

    def finished(self) -> list[TransferEnd]:
        """Copies, and moves of records, that have ended on this rank since the last call."""
        ended = [n for n, event in self._copies.items() if event is None or event.query()]
        for number in ended:
            del self._copies[number]
        copies = [TransferEnd(number, True) for number in ended]
        return copies if self.peer is None else copies + self._moved(self.peer)

    def _moved(self, peer: Peer) -> list[TransferEnd]:
        peer.expire()
        ended = [number for number, future in self._records.items() if future.done()]
        return [TransferEnd(number, *self._records.pop(number).result()) for number in ended]

    @property
    def has_finished_files(self) -> bool:
        """Whether a transfer of files, or a part of a record, has ended on this rank."""
        return any(future.done() for future in self._common.values())

    def finished_files(self) -> list[TransferEnd]:
        """Transfers of files, and moves of records, that have ended on all ranks since the last
        call, and whether they succeeded on all. All ranks call it together."""
        if self.peer is not None:
            self.peer.expire()
        least = self._mins([_state(future) for future in self._common.values()])
        ended = [
            (number, state == _DONE)
            for number, state in zip(self._common, least, strict=True)
            if state != _PENDING
        ]
        return [self._common_end(*one) for one in ended]

    def _common_end(self, number: int, succeeded: bool) -> TransferEnd:
        result = self._common.pop(number).result()
        if isinstance(result, bool):
            return TransferEnd(number, succeeded)
        if not succeeded:
            return TransferEnd(number, False, result.error or "another rank lacks its part")
        # Every rank moves as many bytes as this one.
        return TransferEnd(number, *result._replace(bytes=result.bytes * self._ranks))

    def found(self) -> dict[str, FoundFile]:
        """The records that an earlier process left in files, on this rank."""
        return {} if self.files is None else self.files.found()

    def common(self, found: dict[str, FoundFile], keys: list[str]) -> dict[str, FoundFile]:
        """Of the records that this rank has found, what all ranks have. The rest is deleted. keys:
        of those that rank 0 has found. All ranks call it together."""
        parts = [(key in found) + (key in found and found[key].has_state) for key in keys]
        kept = {
            key: msgspec.structs.replace(found[key], has_state=least == 2)
            for key, least in zip(keys, self._mins(parts), strict=True)
            if least
        }
        spare = [
            (key, key not in kept)
            for key, one in found.items()
            if key not in kept or (one.has_state and not kept[key].has_state)
        ]
        if self.files is not None and spare:
            self.files.delete(spare)
        return kept

    def close(self) -> None:
        """Wait for what has begun, and give the host's memory back."""
        if self.peer is not None:
            self.peer.close()
        if self.files is not None:
            self.files.close()
        self._host.close()


def _state(future: Future[bool] | Future[Moved]) -> int:
    if not future.done():
        return _PENDING
    result = future.result()
    return _DONE if (result if isinstance(result, bool) else result.succeeded) else _FAILED
