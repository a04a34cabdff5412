"""Which replicas have seen how much of a prompt: a hash chain over its blocks, and a table.

A block is 256 bytes of the prompt's JSON. The hash of a block covers all blocks before it, so two
prompts share a hash exactly as far as they begin alike. The table maps a hash to a set of replicas,
a bit each; it has a fixed size, lies in memory that all gateway processes share, and forgets by
being overwritten. A wrong entry costs a missed hint, never an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

BLOCK = 256
MAX_BLOCKS = 64


def hash_chain(prompt: bytes) -> list[int]:
    """One 64-bit hash for each whole block of the prompt's beginning, at most MAX_BLOCKS.

    The last, partial block of a short prompt counts as one, so that repeats of it are found.
    """
    chain, seed = [], b""
    end = min(len(prompt), BLOCK * MAX_BLOCKS)
    for start in range(0, max(1, end - end % BLOCK), BLOCK):
        seed = blake2b(prompt[start : start + BLOCK] + seed, digest_size=8).digest()
        chain.append(int.from_bytes(seed, "little") or 1)
    return chain


class PrefixTable:
    """Hash -> replicas. cells: uint64 pairs (hash, bits), shared or not."""

    def __init__(self, cells: np.ndarray) -> None:
        self._cells = cells.reshape(-1).data.cast("B").cast("Q")
        self._slots = len(cells)

    def learn(self, slot: int, chain: Iterable[int]) -> None:
        """A replica has, or will have, these blocks in its cache."""
        bit = 1 << (slot % 64)
        for value in chain:
            at = value % self._slots * 2
            known = self._cells[at + 1] if self._cells[at] == value else 0
            self._cells[at] = value
            self._cells[at + 1] = known | bit

    def forget(self, slot: int, chain: Iterable[int]) -> None:
        """A replica has these blocks no more."""
        for value in chain:
            at = value % self._slots * 2
            if self._cells[at] == value:
                self._cells[at + 1] &= ~(1 << (slot % 64)) & (2**64 - 1)

    def longest(self, slots: Sequence[int], chain: Sequence[int]) -> tuple[int, list[int]]:
        """(blocks, slots): the longest beginning known to any of these replicas, and to which."""
        for depth in range(len(chain), 0, -1):
            value = chain[depth - 1]
            at = value % self._slots * 2
            if self._cells[at] != value:
                continue
            bits = self._cells[at + 1]
            having = [slot for slot in slots if bits >> (slot % 64) & 1]
            if having:
                return depth, having
        return 0, []
