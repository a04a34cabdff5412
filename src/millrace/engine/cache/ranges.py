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

    def allocate(self, count: int, *, last: bool = False) -> int | None:
        """The start of `count` bytes; None if no free range is as long. last: from the end of the
        last range that has them. What is all of one size and goes there leaves room for its like.
        """
        needed = max(1, -(-count // ALIGNMENT)) * ALIGNMENT
        places = range(len(self._free))
        for place in reversed(places) if last else places:
            start, end = self._free[place]
            if end - start < needed:
                continue
            found = end - needed if last else start
            left = (start, found) if last else (found + needed, end)
            self._free[place : place + 1] = [left] if left[0] < left[1] else []
            self._taken[found] = found + needed
            return found
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
