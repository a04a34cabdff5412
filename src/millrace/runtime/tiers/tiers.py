"""Starts the transfers of plans, and says which have ended."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from millrace.protocol import FoundFile, StepPlan, Transfer
from millrace.runtime.tiers.disk_cache import DiskCache
from millrace.runtime.tiers.host_cache import HostCache


class Tiers:
    """The tiers below the device of one rank. files: None without a disk cache."""

    def __init__(self, host: HostCache, files: DiskCache | None) -> None:
        self._host = host
        self.files = files
        self._started: dict[int, Any] = {}  # what each waits for: an event, a future, or nothing

    def start(self, plan: StepPlan, wait: bool) -> None:
        """Start a plan's transfers. wait: its steps may read what earlier loads of this rank are
        still bringing, because only rank 0 knows that they have ended there."""
        if wait:
            self._host.wait()
        for transfer in plan.transfers:
            self._started[transfer.id] = self._begin(transfer)
        if self.files is not None and plan.deletes:
            self.files.delete(plan.deletes)

    def _begin(self, transfer: Transfer) -> Any:
        if transfer.kind == "offload":
            return self._host.offload(transfer.moves)
        if transfer.kind == "load":
            return self._host.load(transfer.moves)
        assert self.files is not None
        act = self.files.store if transfer.kind == "store" else self.files.fetch
        return act(transfer.files)

    def finished(self) -> list[tuple[int, bool]]:
        """Transfers that have ended since the last call: (number, whether it succeeded)."""
        ended = []
        for number, waits_for in list(self._started.items()):
            if isinstance(waits_for, Future):
                if waits_for.done():
                    ended.append((number, bool(waits_for.result())))
            elif waits_for is None or waits_for.query():
                ended.append((number, True))
        for number, _ in ended:
            del self._started[number]
        return ended

    def found(self) -> dict[str, FoundFile]:
        """The records that an earlier process left in files."""
        return {} if self.files is None else self.files.found()

    def close(self) -> None:
        """Wait for what has begun, and give the host's memory back."""
        if self.files is not None:
            self.files.close()
        self._host.close()
