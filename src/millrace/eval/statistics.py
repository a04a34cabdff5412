"""The statistics of counts: intervals of a share, and the paired comparison of two runs.

Plain Python on integers; knows nothing of tasks or models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Z95 = 1.959963984540054


def wilson(right: int, total: int, z: float = Z95) -> tuple[float, float]:
    """The 95% interval of a share by Wilson's score: sound at 0%, at 100% and for few items."""
    if total == 0:
        return 0.0, 1.0
    share, square = right / total, z * z
    centre = share + square / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    scale = 1 + square / total
    low = 0.0 if right == 0 else (centre - spread) / scale
    high = 1.0 if right == total else (centre + spread) / scale
    return low, high


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value of McNemar's test.

    only_a, only_b: items that one run alone got right. Were the runs equally good, each such item
    would be either's with even odds.
    """
    total = only_a + only_b
    if total == 0:
        return 1.0
    tail = sum(math.comb(total, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, tail / (1 << (total - 1)))


@dataclass(frozen=True, slots=True)
class Paired:
    """Two runs over the same items. lost: right in a, wrong in b; gained: the reverse."""

    items: int
    right_a: int
    right_b: int
    lost: int
    gained: int

    @property
    def p_value(self) -> float:
        return mcnemar(self.lost, self.gained)


def compare(a: dict[str, bool], b: dict[str, bool]) -> Paired:
    """Pairs two runs by item; both must have the same items."""
    if a.keys() != b.keys():
        raise ValueError("the runs have different items")
    lost = sum(a[key] and not b[key] for key in a)
    gained = sum(b[key] and not a[key] for key in a)
    return Paired(len(a), sum(a.values()), sum(b.values()), lost, gained)
