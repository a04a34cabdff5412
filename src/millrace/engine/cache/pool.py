"""Numbers of pages, slots or snapshots that are free or in use. The runtime owns what they stand
for."""

from __future__ import annotations

from collections.abc import Sequence

NULL_PAGE = 0


class Pool:
    """Numbers first .. first + size - 1, each free or in use, with a reference count.

    The prefix cache has at most one reference to each, by `retain_cached` and `release_cached`.
    """

    def __init__(self, size: int, first: int = 0) -> None:
        self.size = size
        self._first = first
        self._counts = [0] * size
        self._cached = bytearray(size)  # 1 where the prefix cache has a reference
        self._evictable = 0
        self._free = list(range(first + size - 1, first - 1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def evictable(self) -> int:
        """How many numbers only the prefix cache refers to."""
        return self._evictable

    def allocate(self, count: int) -> list[int]:
        """`count` free numbers, lowest first on a fresh pool. The caller has checked `free`."""
        if count > len(self._free):
            raise RuntimeError(f"pool: {count} requested, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for number in taken:
            self._counts[number - self._first] = 1
        return taken

    def retain(self, number: int) -> None:
        """Add a reference to a number that is in use."""
        index = number - self._first
        if self._counts[index] < 1:
            raise RuntimeError(f"pool: {number} is free and cannot be shared")
        self._change_count(index, 1)

    def release(self, number: int) -> None:
        """Remove a reference; the last one frees the number."""
        index = number - self._first
        if self._counts[index] < 1:
            raise RuntimeError(f"pool: {number} freed twice")
        self._change_count(index, -1)
        if self._counts[index] == 0:
            self._free.append(number)

    def retain_all(self, numbers: Sequence[int]) -> None:
        """`retain` for each of many."""
        counts, cached, first = self._counts, self._cached, self._first
        for number in numbers:
            index = number - first
            count = counts[index]
            if count < 1:
                raise RuntimeError(f"pool: {number} is free and cannot be shared")
            if count == 1 and cached[index]:
                self._evictable -= 1
            counts[index] = count + 1

    def release_all(self, numbers: Sequence[int]) -> None:
        """`release` for each of many."""
        counts, cached, first = self._counts, self._cached, self._first
        for number in numbers:
            index = number - first
            count = counts[index] - 1
            if count < 0:
                raise RuntimeError(f"pool: {number} freed twice")
            counts[index] = count
            if not count:
                self._free.append(number)
            elif count == 1 and cached[index]:
                self._evictable += 1

    def retain_cached(self, number: int) -> None:
        """`retain` for the prefix cache, at most once for each number."""
        self.retain(number)
        self._cached[number - self._first] = 1

    def release_cached(self, number: int) -> None:
        """`release` for the prefix cache."""
        index = number - self._first
        self._evictable -= self._counts[index] == 1
        self._cached[index] = 0
        self.release(number)

    def _change_count(self, index: int, change: int) -> None:
        """Change a reference count, and the count of evictable numbers with it."""
        cached = self._cached[index]
        self._evictable -= cached and self._counts[index] == 1
        self._counts[index] += change
        self._evictable += cached and self._counts[index] == 1

    def ref_count(self, number: int) -> int:
        return self._counts[number - self._first]
