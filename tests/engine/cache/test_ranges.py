"""Ranges of bytes never overlap, and what is freed can be used again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millrace.engine.cache.ranges import ALIGNMENT, Ranges


@given(st.lists(st.one_of(st.integers(1, 3000), st.integers(-8, -1)), max_size=60))
def test_ranges_do_not_overlap(actions: list[int]) -> None:
    """A positive number allocates so many bytes, odd ones from the end; a negative one frees one of
    those taken."""
    ranges, taken = Ranges(8000), list[tuple[int, int]]()
    for action in actions:
        if action > 0:
            start = ranges.allocate(action, last=action % 2 == 1)
            if start is not None:
                assert start % ALIGNMENT == 0
                assert all(start + action <= a or a + n <= start for a, n in taken)
                assert start + action <= ranges.size <= 8000
                taken.append((start, action))
        elif taken:
            ranges.free(taken.pop(action % len(taken))[0])
        ranges.check()
    for start, _ in taken:
        ranges.free(start)
    assert ranges.allocate(ranges.size) == 0


def test_what_goes_last_leaves_room_for_its_like() -> None:
    """States of one size at the end, records of many sizes at the beginning: a state that goes is
    replaced in its place, and the records' room stays in one piece."""
    ranges = Ranges(64 * ALIGNMENT)
    states = [ranges.allocate(4 * ALIGNMENT, last=True) for _ in range(8)]
    assert states == [(60 - 4 * n) * ALIGNMENT for n in range(8)]
    assert states[3] is not None
    ranges.free(states[3])
    assert ranges.allocate(30 * ALIGNMENT) == 0
    assert ranges.allocate(4 * ALIGNMENT, last=True) == states[3]
