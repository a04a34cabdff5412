"""Pooling: what several processes recorded is what one would have recorded."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.bench.load.records import RequestTiming, pack, unpack
from millrace.bench.measure.metrics import summarize

MS = 1_000_000


@st.composite
def records(draw: st.DrawFn) -> RequestTiming:
    start = draw(st.integers(0, 2000)) * MS
    gaps = draw(st.lists(st.integers(1, 300), min_size=1, max_size=8))
    times, at = array("q"), start
    for gap in gaps:
        at += gap * MS
        times.append(at)
    failed = draw(st.booleans())
    return RequestTiming(
        index=draw(st.integers(0, 10_000)),
        turn=draw(st.integers(0, 3)),
        scheduled_ns=start - draw(st.integers(0, 50)) * MS,
        start_ns=start,
        end_ns=at + draw(st.integers(0, 5)) * MS,
        chunk_ns=times,
        input_tokens=draw(st.integers(1, 2000)),
        output_tokens=draw(st.integers(len(gaps), 3 * len(gaps))),
        counted=draw(st.booleans()),
        cached_tokens=draw(st.integers(-1, 100)),
        error="broke" if failed else None,
        received_ns=draw(st.sampled_from([0, start + 1])),
        sent_ns=array("q", [t - 1 for t in times] if draw(st.booleans()) else []),
    )


@given(st.lists(records(), max_size=12))
def test_records_survive_the_way_between_processes(made: list[RequestTiming]) -> None:
    assert unpack(pack(made)) == made


@given(made=st.lists(records(), min_size=1, max_size=24), processes=st.integers(1, 5))
def test_pooled_figures_are_those_of_one_process(made: list[RequestTiming], processes: int) -> None:
    """Whatever the split, and however uneven: samples are pooled, nothing is averaged or added."""
    parts = [unpack(pack(made[number::processes])) for number in range(processes)]
    pooled = [record for part in parts for record in part]
    arguments = {"percentiles": (50.0, 99.0), "objectives": {"ttft": 100.0}, "steady_level": 2}
    one, many = summarize(made, **arguments), summarize(pooled, **arguments)
    assert many.overall.duration == one.overall.duration
    assert many.overall.latencies["ttft"].percentiles == one.overall.latencies["ttft"].percentiles
    assert many.overall.latencies["itl"].percentiles == one.overall.latencies["itl"].percentiles
    assert many.overall.output_throughput == pytest.approx(one.overall.output_throughput)
    assert many.peak_concurrency == one.peak_concurrency
    assert (many.failed, many.goodput) == (one.failed, one.goodput)
    assert (many.steady is None) == (one.steady is None)
    if one.steady is not None and many.steady is not None:
        assert many.steady.total_token_throughput == pytest.approx(
            one.steady.total_token_throughput
        )


def test_two_windows_pooled_are_neither_summed_nor_averaged() -> None:
    """Two clients, one after the other: the rate is over both windows, the percentile over all."""

    def run(start: int, ttft: int, count: int) -> list[RequestTiming]:
        return [
            RequestTiming(
                index=i,
                scheduled_ns=start,
                start_ns=start,
                end_ns=start + 1000 * MS,
                chunk_ns=[start + ttft * MS, start + 1000 * MS],
                input_tokens=0,
                output_tokens=100,
            )
            for i in range(count)
        ]

    first, second = run(0, 10, 90), run(1000 * MS, 500, 10)
    together = summarize([*first, *second], percentiles=(99.0,))
    assert together.overall.output_throughput == pytest.approx(100 * 100 / 2.0)
    summed = sum(summarize(part).overall.output_throughput for part in (first, second))
    assert summed == pytest.approx(10_000)  # twice the truth
    assert together.overall.latencies["ttft"].median == pytest.approx(10.0)
    assert together.overall.latencies["ttft"].percentiles[99.0] == pytest.approx(500.0)
