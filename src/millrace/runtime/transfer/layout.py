"""Where a record's bytes lie in the host's memory, and their checksum.

Two engines keep the pages of a record in ranges of their own, so the order of its bytes is one that
both know: of each kind of pages all pages, then the state. A checksum covers units of that order:
each page, and blocks of the state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from millrace.protocol import HostPages

STATE_UNIT = 64 << 10
_WORD = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """`bytes` bytes from `at` on, in units of `unit` bytes; the last unit may be shorter."""

    at: int
    bytes: int
    unit: int


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """page_bytes: of a page in each kind of pages. state_bytes: of all that is not in pages."""

    page_bytes: tuple[int, ...]
    state_bytes: int

    def pieces(
        self, pages: Sequence[HostPages], state_at: int, skip: int = 0, end: int | None = None
    ) -> list[Piece]:
        """Of a record, in order: its pages from `skip` to `end`, and its state. end: None: all
        pages. state_at: -1: no state."""
        found, before = [], 0
        chosen = list(_between(pages, skip, count_pages(pages) if end is None else end))
        for size in self.page_bytes:
            for part in chosen:
                at = part.at + part.count * before + part.first * size
                found.append(Piece(at, (part.end - part.first) * size, size))
            before += size
        if state_at >= 0 and self.state_bytes:
            found.append(Piece(state_at, self.state_bytes, STATE_UNIT))
        return found


def count_pages(pages: Iterable[HostPages]) -> int:
    """How many there are."""
    return sum(part.end - part.first for part in pages)


def _between(pages: Iterable[HostPages], skip: int, end: int) -> Iterator[HostPages]:
    """The pages of a record from `skip` to `end`."""
    before = 0  # pages of the record, in front of the part
    for part in pages:
        first = max(part.first, part.first + skip - before)
        last = min(part.end, part.first + end - before)
        if first < last:
            yield HostPages(part.at, part.count, first, last)
        before += part.end - part.first


def total(pieces: Iterable[Piece]) -> int:
    """Their bytes."""
    return sum(piece.bytes for piece in pieces)


def checksum(memory: Tensor, pieces: Iterable[Piece]) -> bytes:
    """Of pieces of memory (uint8 [N]): a hash of the units' sums, which run at the memory's speed.
    A change of one word is always seen, and so is a unit in another's place."""
    hasher = blake2b(digest_size=16)
    for piece in pieces:
        data = memory[piece.at : piece.at + piece.bytes]
        whole = piece.bytes // piece.unit * piece.unit
        if whole:
            hasher.update(_sums(data[:whole].view(-1, piece.unit)))
        if whole < piece.bytes:
            hasher.update(_sums(data[whole:].view(1, -1)))
    return hasher.digest()


def _sums(units: Tensor) -> bytes:
    """The sum of each row, modulo 2^64. units: uint8 [N, bytes]."""
    if units.storage_offset() % _WORD:
        units = units.clone()
    words = units.view(torch.int64) if units.shape[1] % _WORD == 0 else units
    return words.sum(1, dtype=torch.int64).cpu().numpy().tobytes()
