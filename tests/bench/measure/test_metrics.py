"""Every formula against its definition, written out in plain Python."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.bench.load.records import RequestTiming
from millrace.bench.measure.metrics import (
    distribution,
    full_concurrency_window,
    meets,
    overall_window,
    partial_window,
    peak_concurrency,
    summarize,
)
from millrace.bench.report.run_report import detail_fields, summary_fields

MS = 1_000_000


def record(
    start: int, chunks: list[int], *, out: int = 0, inp: int = 10, error: str | None = None
) -> RequestTiming:
    """Times in ms."""
    end = chunks[-1] if chunks else start
    return RequestTiming(
        index=0,
        scheduled_ns=start * MS,
        start_ns=start * MS,
        end_ns=end * MS,
        chunk_ns=[at * MS for at in chunks],
        input_tokens=inp,
        output_tokens=out or len(chunks),
        error=error,
    )


@st.composite
def records(draw: st.DrawFn) -> list[RequestTiming]:
    made = []
    for _ in range(draw(st.integers(1, 12))):
        start = draw(st.integers(0, 500))
        gaps = draw(st.lists(st.integers(0, 60), min_size=1, max_size=10))
        times = [start + 1 + sum(gaps[: i + 1]) for i in range(len(gaps))]
        out = len(times) * draw(st.integers(1, 3))
        error = draw(st.sampled_from([None, None, None, "broken"]))
        made.append(record(start, times, out=out, inp=draw(st.integers(1, 99)), error=error))
    return made


def percentile(samples: list[float], p: float) -> float:
    """Linear interpolation between order statistics (Hyndman and Fan's definition 7)."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * p / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@given(
    samples=st.lists(st.floats(0, 1e6), min_size=1, max_size=50),
    p=st.floats(0, 100, allow_subnormal=False),
)
def test_a_distribution_is_what_its_definition_says(samples: list[float], p: float) -> None:
    seen = distribution(samples, [p])
    close = {"rel": 1e-9, "abs": 1e-6}
    assert seen.count == len(samples)
    assert seen.mean == pytest.approx(math.fsum(samples) / len(samples), **close)
    assert seen.median == pytest.approx(statistics.median(samples), **close)
    assert seen.std == pytest.approx(statistics.pstdev(samples), rel=1e-6, abs=1e-3)
    assert seen.percentiles[p] == pytest.approx(percentile(samples, p), **close)


def test_no_samples_give_zeros() -> None:
    seen = distribution([], [99.0])
    assert (seen.count, seen.mean, seen.percentiles) == (0, 0.0, {99.0: 0.0})


def test_one_request_by_hand() -> None:
    one = record(100, [150, 160, 180], out=5)
    assert one.ttft == pytest.approx(0.050)
    assert one.itls == pytest.approx([0.010, 0.020])
    assert one.e2el == pytest.approx(0.080)
    assert one.tpot == pytest.approx(0.030 / 4)
    assert record(0, [10], out=1).tpot is None


@given(records())
def test_a_run_is_what_its_definition_says(run: list[RequestTiming]) -> None:
    done = [r for r in run if r.error is None]
    window = overall_window(run, [50.0])
    duration = (max(r.end_ns for r in run) - min(r.start_ns for r in run)) / 1e9
    assert window.duration == pytest.approx(duration)
    assert window.completed == len(done)
    out = sum(r.output_tokens for r in done)
    everything = out + sum(r.input_tokens for r in done)
    assert window.output_throughput * duration == pytest.approx(out)
    assert window.total_token_throughput * duration == pytest.approx(everything)
    assert window.request_throughput * duration == pytest.approx(len(done))
    # TPOT is the unweighted mean over requests with more than one token.
    tpots = [
        (r.chunk_ns[-1] - r.chunk_ns[0]) / 1e6 / (r.output_tokens - 1)
        for r in done
        if r.output_tokens > 1
    ]
    assert window.latencies["tpot"].count == len(tpots)
    assert window.latencies["tpot"].mean == pytest.approx(statistics.fmean(tpots) if tpots else 0)
    # Gaps are pooled over requests.
    gaps = [(b - a) / 1e6 for r in done for a, b in zip(r.chunk_ns, r.chunk_ns[1:], strict=False)]
    assert window.latencies["itl"].count == len(gaps)
    assert window.latencies["itl"].mean == pytest.approx(statistics.fmean(gaps) if gaps else 0)


@given(records())
def test_failures_are_counted_and_nothing_else_of_them_is(run: list[RequestTiming]) -> None:
    summary = summarize(run)
    failed = [r for r in run if r.error is not None]
    assert summary.failed == len(failed)
    assert summary.overall.completed == len(run) - len(failed)
    kept = [r for r in run if r.error is None]
    assert summary.total_output_tokens == sum(r.output_tokens for r in kept)
    assert summary.overall.latencies["ttft"].count == len(kept)


@given(run=records(), cut=st.integers(0, 1200))
def test_windows_side_by_side_hold_each_token_once(run: list[RequestTiming], cut: int) -> None:
    begin, end = 0, 1300 * MS
    parts = [partial_window(run, begin, cut * MS, []), partial_window(run, cut * MS, end, [])]
    done = [r for r in run if r.error is None]
    output = sum(p.output_throughput * p.duration for p in parts)
    total = sum(p.total_token_throughput * p.duration for p in parts)
    if cut > 0:
        assert output == pytest.approx(sum(r.output_tokens for r in done))
        assert total == pytest.approx(sum(r.output_tokens + r.input_tokens for r in done))
    for name in ("ttft", "itl", "tpot", "e2el"):
        pooled = overall_window(run, []).latencies[name].count
        assert sum(p.latencies[name].count for p in parts) == pooled


@given(records())
def test_peak_concurrency_is_the_most_at_any_moment(run: list[RequestTiming]) -> None:
    moments = {r.start_ns for r in run}
    expected = max(sum(r.start_ns <= at < r.end_ns for r in run) for at in moments)
    assert peak_concurrency(run) == expected


def test_the_full_window_bridges_dips_and_leaves_out_ramp_and_drain() -> None:
    run = [
        record(0, [50]),
        record(10, [90]),
        record(51, [120]),  # one at a time ends at 50, the next starts at 51: a dip
        record(91, [200]),
    ]
    assert full_concurrency_window(run, 2) == (10 * MS, 120 * MS)
    assert full_concurrency_window(run, 3) is None
    steady = summarize(run, steady_level=2).steady
    assert steady is not None
    assert steady.latencies["ttft"].count == 2  # those at 50 and at 90; 120 lies behind it
    assert steady.duration == pytest.approx(0.110)


def test_goodput_counts_requests_within_every_objective() -> None:
    fast, slow = record(0, [10, 20, 30]), record(0, [10, 100, 1000])
    one_token = record(0, [10], out=1)
    assert meets(fast, {"ttft": 10, "tpot": 10, "e2el": 30})
    assert not meets(slow, {"ttft": 10, "tpot": 10})
    assert meets(one_token, {"tpot": 1})
    summary = summarize([fast, slow, one_token], objectives={"tpot": 10})
    assert summary.goodput == pytest.approx(2 / 1.0)
    assert summarize([fast]).goodput is None


def test_the_json_has_the_names_that_readers_know() -> None:
    run = [record(0, [10, 20, 30]), record(5, [], error="refused")]
    fields = summary_fields(summarize(run, percentiles=[50.0, 99.9]))
    for name in ("ttft", "tpot", "itl", "e2el"):
        for figure in ("mean", "median", "std", "p50", "p99.9"):
            assert isinstance(fields[f"{figure}_{name}_ms"], float)
    assert fields["mean_ttft_ms"] == pytest.approx(10.0)
    assert {"duration", "completed", "failed", "total_input_tokens", "total_output_tokens"} <= set(
        fields
    )
    assert {"request_throughput", "request_goodput", "output_throughput"} <= set(fields)
    detail = detail_fields(run)
    assert detail["errors"] == ["", "refused"]
    assert detail["ttfts"] == [pytest.approx(0.010), 0.0]
    assert detail["itls"][0] == pytest.approx([0.010, 0.010])
    assert detail["start_times"] == [0.0, pytest.approx(0.005)]
