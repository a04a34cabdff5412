"""Times of steps by kind, and the share in which the device waited for the host."""

from __future__ import annotations

import pytest

from millrace.engine.step import StepTimes
from millrace.protocol import Chunk, StepPlan

PIECE = Chunk(1, 0, 2, False)


def plan(decode: int, chunks: int) -> StepPlan:
    return StepPlan(1, [], [], [2] * decode, [PIECE] * chunks, [], 0)


def test_steps_count_by_kind() -> None:
    times = StepTimes(overlaps=False, has_device=False)
    for decode, chunks, seconds in ((1, 0, 0.5), (1, 0, 0.25), (0, 1, 1.0), (2, 1, 2.0)):
        times.add(plan(decode, chunks), seconds, 0.0)
    assert times.totals == [2, 0.75, 0, 1, 1.0, 0, 1, 2.0, 0]


@pytest.mark.parametrize(
    ("overlaps", "waited", "host_bound"),
    [
        (True, 0.0, 1.0),  # the result was there: the device had ended before
        (True, 0.3, 0.0),  # the host waited, so the device was busy all the time
        (False, 0.3, 0.7),  # nothing overlaps: what is no waiting is the host's work
        (False, 1.2, 0.0),
    ],
)
def test_what_is_host_bound(overlaps: bool, waited: float, host_bound: float) -> None:
    times = StepTimes(overlaps=overlaps, has_device=True)
    times.add(plan(1, 0), 1.0, waited)
    assert times.totals[2] == pytest.approx(host_bound)
