"""The report on sums over ranks, from two real ranks over Gloo."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from millrace.cli import run
from millrace.doctor import allreduce as doctor
from millrace.model.config import read_config
from millrace.model.tiny import UNIT_TEST, write_checkpoint
from millrace.runtime.ranks.allreduce import calls_per_step
from tests.support.engines import build, generate


def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is right, and a step makes as many sums as the calls_per_step says."""
    monkeypatch.setattr(doctor, "ROWS", [1, 4])
    monkeypatch.setattr(doctor, "BATCHES", (1, 2))
    monkeypatch.setattr(doctor, "_STEPS", 4)
    model = write_checkpoint(tmp_path / "model", UNIT_TEST, seed=1)
    spec = {"num_speculative_tokens": 2}
    engine = build(model, tensor_parallel_size=2, speculative_config=spec, max_num_seqs=2)
    try:
        found = doctor.measure_engine(engine)
        seen: list[int] = []
        counted = engine.worker.all_reduce
        generate(engine, [[5, 6, 7]], 12, between=lambda: seen.append(counted.calls))
    finally:
        engine.close()
    sums = calls_per_step(read_config(model), 2)
    assert {b - a for a, b in pairwise(seen)} == {sums}
    for rows in (found["table"], found["used"]):
        assert {row["algorithm"] for row in rows} == {"gloo", "gloo one-shot"}
        assert not [row["problem"] for row in rows if row["problem"]]
        assert sum(row["chosen"] for row in rows) == len({row["bytes"] for row in rows})
    assert [row["bytes"] for row in found["table"]] == [256, 256, 1024, 1024]
    assert [(row["batch"], row["sums_per_step"]) for row in found["budget"]] == [
        (1, sums),
        (2, sums),
    ]
    for row in found["budget"]:
        assert 0 < row["share"] < 10
        assert 1.0 <= row["tokens_per_step"] <= 3.0
        assert row["sums_per_token"] == pytest.approx(sums / row["tokens_per_step"])
    text = doctor.report(msgspec.json.decode(msgspec.json.encode(found)))
    assert text.startswith("2 ranks of ")
    assert "| 0.25 KiB | gloo |" in text


def test_a_model_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--collectives"]) == 2
    assert (
        capsys.readouterr().err == "millrace doctor: --collectives needs a MODEL to measure with\n"
    )
