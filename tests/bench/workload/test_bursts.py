"""Streams with bursts beside them: what is sent when, and what is said of which."""

from __future__ import annotations

import pytest

from millrace.bench.load.records import RequestTiming
from millrace.bench.measure.bursts import burst_fields
from millrace.bench.workload.bursts import Bursts, burst_workload
from millrace.errors import UserError


def record(index: int, first: float, gap: float, count: int) -> RequestTiming:
    chunks = [round((first + n * gap) * 1e6) for n in range(count)]
    return RequestTiming(
        index=index, scheduled_ns=0, start_ns=0, end_ns=chunks[-1], chunk_ns=chunks,
        input_tokens=1, output_tokens=count,
    )  # fmt: skip


def test_streams_begin_together_and_bursts_follow() -> None:
    spec, times = burst_workload(Bursts(streams=3, count=2, size=2, every=1.5, input=9), seed=1)
    assert times == (0, 0, 0, 1.5, 1.5, 3.0, 3.0)
    assert [row.input_tokens for row in spec.rows] == [128] * 3 + [9] * 4


def test_gaps_are_those_of_streams_alone() -> None:
    spec, _ = burst_workload(Bursts(streams=2, count=1, size=1), seed=1)
    records = [record(0, 5.0, 10.0, 9), record(1, 5.0, 10.0, 9), record(2, 700.0, 900.0, 4)]
    found = burst_fields(spec, records)
    assert found["p99_stream_itl_ms"] == pytest.approx(10.0)
    assert found["p50_prompt_ttft_ms"] == pytest.approx(700.0)


@pytest.mark.parametrize("name", Bursts.__struct_fields__)
def test_numbers_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--burst-{name.replace('_', '-')} 0"):
        Bursts(**{name: 0}).check()
