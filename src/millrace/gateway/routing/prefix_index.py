"""Which replicas have seen how much of a prompt: a table of hashes, and what replicas report.

The table maps a hash (prefix_hash.py) to a set of replicas, a bit each; it has a fixed size, lies
in memory that all gateway processes share, and forgets by being overwritten. A wrong entry, even
one made on purpose, costs a missed hint, never an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from millrace.common.prefix_hash import PrefixReport
from millrace.gateway.common.shared_counters import SharedCounters


class PrefixTable:
    """Hash -> replicas. cells: uint64 pairs (hash, bits), shared or not."""

    def __init__(self, cells: np.ndarray) -> None:
        self._cells = cells.reshape(-1).data.cast("B").cast("Q")
        self._slots = len(cells)

    def learn(self, slot: int, chain: Iterable[int]) -> None:
        """A replica has, or will have, these blocks in its cache."""
        cells, slots, bit = self._cells, self._slots, 1 << (slot % 64)
        for value in chain:
            at = value % slots * 2
            if cells[at] == value:
                cells[at + 1] |= bit
            else:
                cells[at] = value
                cells[at + 1] = bit

    def forget(self, slot: int, chain: Iterable[int]) -> None:
        """A replica has these blocks no more."""
        for value in chain:
            at = value % self._slots * 2
            if self._cells[at] == value:
                self._cells[at + 1] &= ~(1 << (slot % 64)) & (2**64 - 1)

    def longest(self, slots: Sequence[int], chain: Sequence[int]) -> tuple[int, list[int]]:
        """(blocks, slots): the longest beginning known to any of these replicas, and to which."""
        cells = self._cells
        for depth in range(len(chain), 0, -1):
            value = chain[depth - 1]
            at = value % self._slots * 2
            if cells[at] != value:
                continue
            bits = cells[at + 1]
            having = [slot for slot in slots if bits >> (slot % 64) & 1]
            if having:
                return depth, having
        return 0, []


class ReportedPrefixes:
    """What one replica has reported of its prefixes, and how far. since: the cursor to name."""

    def __init__(self, counters: SharedCounters, slot: int) -> None:
        self._counters = counters
        self._slot = slot
        self._table = PrefixTable(counters.prefixes)
        self._epoch = ""
        self.since = "0"

    def forget(self) -> None:
        """The replica may have lost its cache: let it tell all that it still holds."""
        self._counters.forget_prefixes(self._slot)
        self._epoch, self.since = "", "0"

    def take(self, report: PrefixReport, asked: str | None) -> None:
        """Learn what it told when asked with that cursor; nothing if all was forgotten since. One
        with another epoch holds nothing of what was known before."""
        if asked != self.since:
            return
        if self._epoch not in ("", report.epoch):
            self._counters.forget_prefixes(self._slot)
        self._epoch, self.since = report.epoch, report.since
        self._table.learn(self._slot, report.hashes)
