"""Comparing runs: a difference where there is one, and none where there is none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.bench.report.compare import compare, comparison_table, ratio_of
from millrace.bench.report.results import ResultFile, load_results
from millrace.errors import UserError


def result(total: float, ttft: float = 50.0, **fields: Any) -> ResultFile:
    return ResultFile(
        Path("x.json"),
        {
            "total_token_throughput": total,
            "median_ttft_ms": ttft,
            "max_concurrency": 8,
            "request_rate": "inf",
            "model_id": "m",
            **fields,
        },
    )


@pytest.mark.parametrize("runs", [2, 3, 5, 10])
def test_equal_servers_differ_in_one_comparison_of_twenty(runs: int) -> None:
    """Without a difference, the 95% interval misses 1 about as often as it should, even of three
    runs; resampling would miss it three times as often there."""
    rng = np.random.default_rng(7)
    wrong = 0
    for _ in range(600):
        a, b = (np.exp(rng.normal(3.0, 0.05, runs)).tolist() for _ in range(2))
        wrong += ratio_of("total_token_throughput", a, b).differs
    assert wrong / 600 < 0.08


def test_a_real_difference_is_found_and_named() -> None:
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(200):
        a = np.exp(rng.normal(3.0, 0.02, 5)).tolist()
        b = np.exp(rng.normal(3.0 + math.log(1.2), 0.02, 5)).tolist()
        ratio = ratio_of("total_token_throughput", a, b)
        found += ratio.differs and "better by" in ratio.verdict
    assert found > 195


@given(
    a=st.lists(st.floats(1, 1e6), min_size=2, max_size=6),
    b=st.lists(st.floats(1, 1e6), min_size=2, max_size=6),
    factor=st.floats(0.01, 100),
)
def test_the_ratio_and_its_interval_scale_and_turn_around(
    a: list[float], b: list[float], factor: float
) -> None:
    one, back = ratio_of("x", a, b), ratio_of("x", b, a)
    assert one.low is not None
    assert one.high is not None
    assert one.low <= one.ratio * 1.0000001
    assert one.ratio <= one.high * 1.0000001
    assert back.ratio == pytest.approx(1 / one.ratio)
    assert back.low == pytest.approx(1 / one.high)
    scaled = ratio_of("x", a, [factor * value for value in b])
    assert scaled.ratio == pytest.approx(factor * one.ratio)


def test_lower_latency_is_better_and_lower_throughput_is_worse() -> None:
    fast = [result(200.0 + i, 20.0 + i / 10) for i in range(3)]
    slow = [result(100.0 + i, 40.0 + i / 10) for i in range(3)]
    (found,) = compare(slow, fast)
    verdicts = {ratio.figure: ratio.verdict for ratio in found.ratios}
    assert verdicts["total_token_throughput"].startswith("B better by")
    assert verdicts["median_ttft_ms"].startswith("B better by")
    (found,) = compare(fast, slow)
    assert {r.verdict.split(" by")[0] for r in found.ratios} == {"B worse"}
    assert "B worse by" in comparison_table(found)


def test_one_run_has_no_interval_and_claims_nothing() -> None:
    (found,) = compare([result(100)], [result(500)])
    assert all(not r.differs and "one run" in r.verdict for r in found.ratios)


def test_only_runs_of_one_load_are_compared() -> None:
    a = [result(100, max_concurrency=8), result(100, max_concurrency=16)]
    b = [result(100, max_concurrency=16, model_id="other")]
    (found,) = compare(a, b)
    assert found.load.startswith("16 users")
    with pytest.raises(UserError, match="max_concurrency 8 and 32"):
        compare([result(1)], [result(1, max_concurrency=32)])


def test_what_is_no_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_results(str(tmp_path / "nothing"))
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="no result"):
        load_results(str(tmp_path))
    (tmp_path / "r.json").write_text(json.dumps(result(5.0).fields))
    assert [r.path.name for r in load_results(str(tmp_path))] == ["r.json"]
