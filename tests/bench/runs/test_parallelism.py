"""The table of TP x DP: every arrangement served, measured and reaped; or it says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from millrace.bench.runs import parallelism
from millrace.bench.runs.accuracy import Accuracy
from millrace.bench.runs.parallelism import (
    ParallelRow,
    all_arrangements,
    measure_parallelism,
    parallelism_fields,
    parallelism_table,
    read_arrangements,
)
from millrace.errors import UserError
from tests.bench.runs.test_scaling import options, row
from tests.support.running import run


def test_arrangements(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all_arrangements(1) == [(1, 1)]
    assert all_arrangements(2) == [(1, 1), (1, 2), (2, 1)]
    assert all_arrangements(4) == [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1)]
    assert all_arrangements(3) == all_arrangements(2)
    assert read_arrangements("2x1,1x3", 8) == [(2, 1), (1, 3)]
    for text in ("", "2", "2x", "0x1", "axb", "1x1x1"):
        with pytest.raises(UserError, match="use TPxDP"):
            read_arrangements(text, 8)
    monkeypatch.setattr(parallelism, "visible_gpus", lambda: ["0", "1"])
    with pytest.raises(UserError, match="'2x2' needs 4 GPUs; 2 are visible"):
        read_arrangements("2x2", 2)


def test_every_arrangement_is_served_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[str]]] = []
    serve = parallelism.served

    def noting(given: Any, replicas: int, arguments: list[str], stop: Any) -> Any:
        seen.append((replicas, arguments))
        return serve(given, replicas)

    monkeypatch.setattr(parallelism, "served", noting)
    steps: list[str] = []
    rows = run(measure_parallelism(options(repeats=2), [(1, 2), (2, 1)], steps.append))
    flag = "--tensor-parallel-size"
    assert seen == [(2, [flag, "1"]), (1, [flag, "2"])] * 2
    assert [len(one.runs) for one in rows] == [2, 2]
    assert [one.accuracy for one in rows] == [Accuracy(0.75, 8)] * 2
    assert steps[0] == "TP x DP 1x2, run 1 of 2"


def test_what_cannot_start_has_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = parallelism.served

    def refusing(given: Any, replicas: int, arguments: list[str], stop: Any) -> Any:
        if arguments[1] == "3":
            raise UserError("tensor_parallel_size 3 cannot split 4 KV heads")
        return serve(given, replicas)

    monkeypatch.setattr(parallelism, "served", refusing)
    rows = run(measure_parallelism(options(), [(3, 1), (1, 1)], print))
    text = parallelism_table(rows)
    assert "3x1 n/a: tensor_parallel_size 3 cannot split 4 KV heads" in text
    assert [fields["devices"] for fields in parallelism_fields(rows)] == [1]
    with pytest.raises(UserError, match="no arrangement could be measured; 3x1: tensor_parallel"):
        run(measure_parallelism(options(), [(3, 1)], print))


def parallel_row(ranks: int, replicas: int, total: float, tpot: float) -> ParallelRow:
    base = row(replicas, total)
    base.runs[0]["median_tpot_ms"] = tpot
    return ParallelRow(ranks=ranks, replicas=replicas, runs=base.runs, accuracy=Accuracy(0.5, 10))


def test_figures() -> None:
    rows = [parallel_row(1, 1, 100, 20), parallel_row(1, 2, 190, 20), parallel_row(2, 1, 150, 12.5)]
    table = parallelism_fields(rows)
    assert [fields["per_device"] for fields in table] == [100, 95, 75]
    assert [fields["efficiency"] for fields in table] == [1.0, 0.95, 0.75]
    assert [fields["tokens_per_user"] for fields in table] == [50, 50, 80]
    text = parallelism_table(rows)
    assert (
        "with 2 devices: highest total throughput with 1x2, fastest for one user with 2x1" in text
    )
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    first, second = [cells for cells in lines if cells[:1] == ["2x1"]]  # it is in two parts
    assert first[:5] == ["2x1", "2", "150", "75", "80.0"]
    assert second[-1] == "50.0%"
