"""Which replicas know which prefixes of prompts: a hash table, and what replicas report.

The table maps a hash (prefix_hash.py) to a set of replicas, one bit each. It has a fixed size, lies
in memory that all gateway processes share, and old entries are overwritten. A wrong entry, even one
made on purpose, costs a cache hit, never a correct answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from millrace.common.prefix_hash import PrefixReport
from millrace.gateway.common.shared_counters import SharedCounters

# Beside a hash, under a key of its own, stands which replicas have it in a lower tier only. A hash
# is a depth and a checksum, and leaves the highest bits free; the low ones choose another cell.
_TIER_KEYS = {"host": 1 << 60 | 0x9E37, "disk": 1 << 61 | 0x7F4B}


class PrefixTable:
    """Hash -> replicas. cells: uint64 pairs (hash, bits), shared or not."""

    def __init__(self, cells: np.ndarray) -> None:
        self._cells = cells.reshape(-1).data.cast("B").cast("Q")
        self._slots = len(cells)

    def learn(self, slot: int, chain: Iterable[int]) -> None:
        """Record that a replica has, or will have, these blocks in its cache."""
        cells, slots, bit = self._cells, self._slots, 1 << (slot % 64)
        for value in chain:
            at = value % slots * 2
            if cells[at] == value:
                cells[at + 1] |= bit
            else:
                cells[at] = value
                cells[at + 1] = bit

    def forget(self, slot: int, chain: Iterable[int]) -> None:
        """Record that a replica no longer has these blocks."""
        for value in chain:
            at = value % self._slots * 2
            if self._cells[at] == value:
                self._cells[at + 1] &= ~(1 << (slot % 64)) & (2**64 - 1)

    def put_in_tier(self, slot: int, chain: Sequence[int], tier: str) -> None:
        """Record in which tier of a replica these blocks are: device, host or disk."""
        for name, key in _TIER_KEYS.items():
            keys = [value ^ key for value in chain]
            if name == tier:
                self.learn(slot, keys)
            else:
                self.forget(slot, keys)

    def tier(self, slot: int, value: int) -> str:
        """The tier of a block that the replica knows."""
        cells, bit = self._cells, 1 << (slot % 64)
        for name, key in _TIER_KEYS.items():
            at = (value ^ key) % self._slots * 2
            if cells[at] == value ^ key and cells[at + 1] & bit:
                return name
        return "device"

    def longest_match(self, slots: Sequence[int], chain: Sequence[int]) -> tuple[int, list[int]]:
        """(blocks, slots): the longest prefix that any of these replicas knows, and which do."""
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
    """The prefix reports of one replica. cursor: where the next report begins."""

    def __init__(self, counters: SharedCounters, slot: int) -> None:
        self._counters = counters
        self._slot = slot
        self._table = PrefixTable(counters.prefixes)
        self._epoch = ""
        self.cursor = "0"

    def forget(self) -> None:
        """The replica may have lost its cache: the next report is a complete one."""
        self._counters.forget_prefixes(self._slot)
        self._epoch, self.cursor = "", "0"

    def apply(self, report: PrefixReport, asked: str | None) -> None:
        """Apply a report that was requested with the cursor `asked`; it is ignored if the cursor
        has been reset since. A new epoch invalidates all that was known before."""
        if asked != self.cursor:
            return
        if self._epoch not in ("", report.epoch):
            self._counters.forget_prefixes(self._slot)
        self._epoch, self.cursor = report.epoch, report.since
        found = {"device": report.hashes, "host": report.host, "disk": report.disk}
        for tier, hashes in found.items():
            self._table.learn(self._slot, hashes)
            self._table.put_in_tier(self._slot, hashes, tier)
        self._table.forget(self._slot, report.gone)
