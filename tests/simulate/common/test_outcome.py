"""Figures of records: percentiles, windows, rates."""

from __future__ import annotations

import numpy as np
import pytest

from millrace.simulate.common.outcome import Gaps, Records, TimeLine, figures
from millrace.simulate.common.virtual_clock import VirtualClock


def test_percentiles_of_gaps_are_within_two_percent() -> None:
    one, many = Gaps(), Gaps()
    values = np.random.default_rng(0).lognormal(-4, 1, 5000)
    for value in values.tolist():
        one.add(value)
    many.add_many(values, np.ones(len(values), dtype=np.int64))
    for percent in (1, 50, 99):
        wanted = float(np.percentile(values, percent))
        assert one.percentile(percent) == pytest.approx(wanted, rel=0.02)
        assert many.percentile(percent) == one.percentile(percent)
    assert one.sum == pytest.approx(values.sum()) == pytest.approx(many.sum)


def test_figures_of_a_window() -> None:
    records = Records()
    for at in range(10):
        record = records.add(due=float(at), sent=at + 0.5, prompt=10, turn=0)
        record.chunk(at + 1.0, 1)
        record.chunk(at + 2.0, 2)
        record.end(at + 2.0, "lost" if at == 9 else "")
    whole = figures(records, 0.0, 12.0, {"ttft": 1000.0})
    assert (whole.completed, whole.failed, whole.output_tokens) == (9, 1, 27)
    assert whole.ttft.mean == pytest.approx(1.0)
    assert whole.tpot.mean == pytest.approx(0.5)
    assert whole.e2el.p99 == pytest.approx(2.0)
    assert whole.good == pytest.approx(9 / 12)
    part = figures(records, 4.0, 6.0)
    assert part.completed == 3  # those that ended at 4, 5 and 6
    assert part.in_flight == pytest.approx(1.5)
    assert part.requests_rate == pytest.approx(1.5)


def test_a_time_line_has_sums_and_shares_of_seconds() -> None:
    one, many = TimeLine(), TimeLine()
    moments, values = np.array([0.2, 0.9, 3.5, 3.6]), np.array([1.0, 2.0, 4.0, 8.0])
    for at, value in zip(moments.tolist(), values.tolist(), strict=True):
        one.add(at, value)
    many.add_many(moments, values)
    assert list(one.values) == list(many.values) == [3.0, 0.0, 0.0, 12.0]
    assert one.between(0.0, 3.5) == pytest.approx(9.0)


def test_calls_come_in_the_order_of_their_times() -> None:
    clock, seen = VirtualClock(), list[str]()
    clock.call_later(2.0, seen.append, "late")
    clock.call_later(1.0, seen.append, "first")
    clock.call_later(1.0, seen.append, "second")
    dropped = clock.call_later(0.5, seen.append, "never")
    clock.call_at(-3.0, lambda: clock.call_later(1.5, seen.append, "between"))
    dropped.cancel()
    assert clock.next_call == 0.0
    clock.run(1.7)
    assert seen == ["first", "second", "between"]
    assert clock.now() == 1.7
    clock.run(9.0, done=lambda: len(seen) == 4)
    assert seen[-1] == "late"
    assert clock.now() == 2.0
