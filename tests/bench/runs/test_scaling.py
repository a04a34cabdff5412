"""The scaling table: servers started and reaped, medians, efficiency, accuracy beside speed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from millrace.bench.load.options import BenchOptions
from millrace.bench.report.tables import TERMINAL
from millrace.bench.runs.accuracy import Accuracy, measure_accuracy, read_accuracy
from millrace.bench.runs.scaling import (
    ScalingOptions,
    ScalingRow,
    measure_scaling,
    scaling_fields,
    scaling_table,
)
from millrace.bench.workload.prompts import RandomSpec
from millrace.common.http_client import Target
from millrace.errors import UserError
from millrace.eval.results import Answer, write_results
from millrace.tasks import Grade, make_items
from tests.support.running import run

MOCK = (sys.executable, str(Path(__file__).parents[2] / "support" / "mock_replica.py"))
SPEC = RandomSpec(count=6, input_len=4, output_len=3)

# An evaluation that answers as many items as it is asked, three quarters of them right.
EVALUATION = """
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
items = int(options["--num-items"])
assert options["--base-url"].startswith("http://127.0.0.1:")
task = {"items": {"right": 6, "total": items, "accuracy": 0.75}, "errors": 0}
report = {"format": 1, "summary": {options["--tasks"]: task}}
open(options["--json"], "w").write(json.dumps(report))
"""


def options(**changes: Any) -> ScalingOptions:
    return ScalingOptions(
        **{
            "serve_command": MOCK,
            "eval_command": (sys.executable, "-c", EVALUATION),
            "model": "mock",
            "counts": [1, 2],
            "load": BenchOptions(target=Target("127.0.0.1", 0), workload=SPEC, max_concurrency=2),
            "accuracy_items": 8,
            "start_timeout": 20.0,
            **changes,
        }
    )


def test_every_count_is_measured_and_nothing_is_left() -> None:
    steps: list[str] = []
    rows = run(measure_scaling(options(repeats=2), steps.append))
    assert [row.replicas for row in rows] == [1, 2]
    assert [len(row.runs) for row in rows] == [2, 2]
    assert all(r["completed"] == 6 for row in rows for r in row.runs)
    assert [row.accuracy for row in rows] == [Accuracy(0.75, 8)] * 2
    assert [step for step in steps if "run" in step] == [
        "1 replica(s), run 1 of 2",
        "2 replica(s), run 1 of 2",
        "1 replica(s), run 2 of 2",
        "2 replica(s), run 2 of 2",
    ]
    assert not [c for c in psutil.Process().children(recursive=True) if MOCK[1] in c.cmdline()]


def test_a_replica_has_the_same_threads_in_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    told = tmp_path / "threads"
    run(measure_scaling(options(serve_arguments=["--threads-file", str(told)]), print))
    expected = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [line.split()[0] for line in told.read_text().splitlines()] == [expected] * 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"accuracy_items": 0}, "not asked for"),
        ({"serve_arguments": ["--load-format=dummy"]}, "random weights (--load-format dummy)"),
    ],
)
def test_accuracy_is_left_out_where_it_has_no_meaning(changes: Any, reason: str) -> None:
    (row,) = run(measure_scaling(options(counts=[1], **changes), print))
    assert row.accuracy == Accuracy(None, reason=reason)


def row(replicas: int, *totals: float, accuracy: Accuracy | None = None) -> ScalingRow:
    latencies = {
        f"{figure}_{name}_ms": 1.0 + i
        for i, figure in enumerate(("mean", "median", "p99"))
        for name in ("ttft", "tpot", "itl")
    }
    runs = [
        {
            "total_token_throughput": total,
            "output_throughput": total / 3,
            "request_throughput": total / 100,
            "max_concurrent_requests": 16,
            "completed": 5,
            "failed": 0,
            **latencies,
        }
        for total in totals
    ]
    return ScalingRow(replicas=replicas, runs=runs, accuracy=accuracy or Accuracy(0.5, 10))


def test_figures_are_medians_and_efficiency_is_relative_to_the_first_row() -> None:
    first, second = scaling_fields([row(2, 100, 300, 200), row(4, 300, 360, 100)])
    assert (first["total_token_throughput"], first["per_replica"]) == (200, 100)
    assert first["efficiency"] == 1.0
    assert (second["per_replica"], second["efficiency"]) == (75, 0.75)


def test_the_table_says_why_there_is_no_accuracy() -> None:
    table = scaling_table([row(1, 1000.0), row(2, 1500, accuracy=Accuracy(None, reason="random"))])
    lines = table.splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert max(map(len, lines)) <= TERMINAL
    first, second = ([cell.strip() for cell in lines[n].split("|")[1:-1]] for n in (2, 7))
    assert first[0] == second[0]  # what the row is, again in the second table
    cells = first + second[1:]
    latency = "1.0 / 2.0 / 3.0"
    expected = [
        "1",
        "1,000",
        "1,000",
        "100.0%",
        "333",
        "16",
        "10.00",
        latency,
        latency,
        latency,
        "",
        "50.0%",
    ]
    assert cells == expected
    assert lines[8].rstrip(" |").endswith("n/a")
    assert lines[-1] == "accuracy n/a: random"


def test_a_server_that_does_not_come_up_is_told_with_its_last_words() -> None:
    with pytest.raises(UserError, match=r"the server of mock ended .* error: out of memory"):
        run(measure_scaling(options(serve_arguments=["--fail", "out of memory"]), print))


def test_a_server_that_answers_nothing_well_fails() -> None:
    with pytest.raises(UserError, match="the model fell over"):
        run(measure_scaling(options(serve_arguments=["--behaviour", "error"]), print))


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.exit('millrace eval: no such task')", "millrace eval: no such task"),
        ("pass", "the evaluation failed"),
        ("import time; time.sleep(60)", "longer than 2 s"),
    ],
)
def test_an_evaluation_that_fails_leaves_a_reason(program: str, reason: str) -> None:
    found = run(
        measure_accuracy(
            "http://x", command=(sys.executable, "-c", program), task="math", items=1, limit=2.0
        )
    )
    assert found.value is None
    assert reason in (found.reason or "")
    assert str(found) == "n/a"


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ("{", "cannot be read"),
        ('{"summary": {}}', "no task 'math'"),
        (
            '{"summary": {"math": {"items": {"total": 4, "accuracy": 0}, "errors": 4}}}',
            "none of 4 items got an answer",
        ),
    ],
)
def test_a_report_without_the_figure_leaves_a_reason(report: str, reason: str) -> None:
    assert reason in (read_accuracy(report.encode(), "math").reason or "")


def test_the_figure_is_found_in_what_the_evaluation_really_writes(tmp_path: Path) -> None:
    items = make_items("math", 3, 0)
    answers = [
        Answer(item, item.answer, Grade(correct=index != 1)) for index, item in enumerate(items)
    ]
    write_results(tmp_path / "r.json", {"seed": 0}, answers)
    found = read_accuracy((tmp_path / "r.json").read_bytes(), "math")
    assert found == Accuracy(pytest.approx(2 / 3, abs=1e-5), 3)
