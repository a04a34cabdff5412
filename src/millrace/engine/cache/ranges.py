"""Ranges of bytes of one piece of memory: first fit, neighbours that are free become one."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise

ALIGNMENT = 256


class Ranges:
    """Hands out ranges of `size` bytes, at multiples of ALIGNMENT."""

    def __init__(self, size: int) -> None:
        self.size = size // ALIGNMENT * ALIGNMENT
        self._free: list[tuple[int, int]] = [(0, self.size)] if self.size else []  # (start, end)
        self._taken: dict[int, int] = {}  # start: end

    @property
    def used(self) -> int:
        return sum(end - start for start, end in self._taken.items())

    @property
    def count(self) -> int:
        """Ranges that are taken."""
        return len(self._taken)

    def allocate(self, count: int) -> int | None:
        """The start of `count` bytes; None if no free range is as long."""
        needed = max(1, -(-count // ALIGNMENT)) * ALIGNMENT
        for place, (start, end) in enumerate(self._free):
            if end - start >= needed:
                self._free[place] = (start + needed, end)
                if start + needed == end:
                    del self._free[place]
                self._taken[start] = start + needed
                return start
        return None

    def free(self, start: int) -> None:
        """Give back what `allocate` returned."""
        end = self._taken.pop(start)
        place = bisect_left(self._free, (start, end))
        if place < len(self._free) and self._free[place][0] == end:
            end = self._free.pop(place)[1]
        if place and self._free[place - 1][1] == start:
            start = self._free.pop(place - 1)[0]
        insort(self._free, (start, end))

    def check(self) -> None:
        """Raise AssertionError unless free and taken ranges cover everything once."""
        spans = sorted([*self._free, *self._taken.items()])
        assert sum(end - start for start, end in spans) == self.size, "bytes"
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), "overlap"
        assert all(a[1] < b[0] for a, b in pairwise(self._free)), "merged"
