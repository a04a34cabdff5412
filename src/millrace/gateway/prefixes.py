"""Which replicas have seen how much of a prompt: a hash chain over its blocks, and a table.

A block is 256 bytes of the prompt's JSON. The hash of a block covers all blocks before it, so two
prompts share a hash as far as they begin alike. It is a checksum, which goes on from block to block
for next to nothing. The table maps a hash to a set of replicas, a bit each; it has a fixed size,
lies in memory that all gateway processes share, and forgets by being overwritten. A wrong entry,
even one made on purpose, costs a missed hint, never an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from zlib import crc32

import numpy as np

BLOCK = 256
MAX_BLOCKS = 64


def hash_chain(prompt: bytes) -> list[int]:
    """One hash (its depth, and 32 bits) for each whole block of the prompt's beginning, at most
    MAX_BLOCKS.

    The last, partial block of a short prompt counts as one, so that repeats of it are found.
    """
    chain, so_far = [], 0
    end = min(len(prompt), BLOCK * MAX_BLOCKS)
    for start in range(0, max(1, end - end % BLOCK), BLOCK):
        so_far = crc32(prompt[start : start + BLOCK], so_far)
        chain.append(start + BLOCK << 32 | so_far)
    return chain


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
