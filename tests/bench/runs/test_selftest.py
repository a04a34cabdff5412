"""The built-in mock, and the errors that are found against its stamps."""

from __future__ import annotations

from array import array

import pytest
from click.testing import CliRunner

from millrace.bench.command import bench
from millrace.bench.load.records import RequestTiming
from millrace.bench.measure.metrics import summarize
from millrace.bench.runs.selftest import errors_of, level_rows, selftest, truths
from millrace.errors import UserError
from tests.support.running import run

MS = 1_000_000


def stamped(late_ms: list[float]) -> RequestTiming:
    """Sent at 50, 100, 150 ... ms, stamped that much later by the client."""
    sent = [50 * (n + 1) * MS for n in range(len(late_ms))]
    seen = [at + round(late * MS) for at, late in zip(sent, late_ms, strict=True)]
    return RequestTiming(
        index=0,
        scheduled_ns=0,
        start_ns=0,
        end_ns=seen[-1],
        chunk_ns=array("q", seen),
        input_tokens=1,
        output_tokens=len(sent),
        received_ns=1 * MS,
        sent_ns=array("q", sent),
    )


def test_the_error_is_what_the_client_added() -> None:
    records = [stamped([5, 5, 5])]
    seen = summarize(records, percentiles=(50.0, 99.0)).overall
    true = summarize(truths(records), percentiles=(50.0, 99.0)).overall
    errors = errors_of(seen, true)
    assert errors["ttft"]["p50"] == pytest.approx(0.1)  # 55 instead of 50
    assert errors["tpot"]["p50"] == pytest.approx(0.0)
    late_in_the_middle = [stamped([0, 10, 0])]
    errors = errors_of(
        summarize(late_in_the_middle, percentiles=(50.0, 99.0)).overall,
        summarize(truths(late_in_the_middle), percentiles=(50.0, 99.0)).overall,
    )
    assert errors["ttft"]["p50"] == 0
    assert errors["itl"]["p99"] == pytest.approx(0.2, abs=0.01)


def test_a_level_is_measured_against_the_mock() -> None:
    (level,) = run(selftest([3], processes=2, seconds=1.2, chat=True))
    assert level.failed == 0
    assert level.client["processes"] == 2
    # Sent before it was seen: the client never reports a chunk earlier than it left.
    assert level.errors["ttft"]["p50"] >= 0
    assert level.read_ms["p50"] >= 0
    head, row = level_rows([level])
    assert len(head) == len(row)


def test_levels_must_be_counts() -> None:
    result = CliRunner().invoke(bench, ["selftest", "--streams", "4,x"])
    assert isinstance(result.exception, UserError)
    assert "--streams '4,x'" in str(result.exception)
