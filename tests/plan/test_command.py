"""`millrace plan`: every form of output, one line for every error, and the document."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from millrace.cli import run
from millrace.engine.plan_log import PlanLog
from tests.plan.calibration.test_observations import hidden_truth, timings

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^millrace plan .*?(?<!\\)$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the document's examples name."""
    monkeypatch.chdir(tmp_path)
    writer = PlanLog(tmp_path / "plan.log")
    for timing in timings(hidden_truth(), 60):
        writer.write(timing)
    writer.close()


def test_the_document_has_examples_of_every_command() -> None:
    commands = {words[2] for words in map(shlex.split, EXAMPLES)}
    assert {"explain", "calibrate", "capacity", "accuracy", "gpus"} <= commands


def test_every_example_of_the_document_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """In their order, since some use what others have written."""
    for example in EXAMPLES:
        words = shlex.split(example.replace("\\\n", " "))
        assert run(words[1:]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out


ARGUMENTS = ["plan", "qwen3.5-27b", "--gpu", "h200", "--concurrency", "16", "--drafts", "1",
             "--tensor-parallel-size", "1", "--max-num-seqs", "64", "--state", "fp32"]  # fmt: skip


def test_json_has_bars_settings_and_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGUMENTS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["choice"]["best"]["prediction"]
    bar = best["bars"]["total_tokens"]
    assert bar["low"] < bar["value"] < bar["high"]
    assert best["deployment"]["description"]["drafts"] == 1
    assert found["cost"]["million"]["value"] > 0
    assert found["against"]


def test_the_html_page_needs_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    assert run([*ARGUMENTS, "--html", str(path)]) == 0
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == 2
    assert "<circle" in page
    assert not re.search(r"(src|href)=|url\(|@import|<script", page)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "qwen3.5-27b", "--gpu", "h2000", "--concurrency", "1"], "known are gb10"),
        (["plan", "qwen9", "--gpu", "h200", "--concurrency", "1"], "unknown model 'qwen9'"),
        (["plan", "qwen3.5-27b", "--gpu", "h200"], "give a concurrency or a rate"),
        ([*ARGUMENTS, "--max-tpot-ms", "0.01"], "no settings meet these limits"),
        ([*ARGUMENTS, "--max-model-len", "999999"], "more than the 262144 positions"),
        ([*ARGUMENTS, "--gpus", "0"], "--gpus 0: use 1 or more"),
        ([*ARGUMENTS, "--html", "/none/page.html"], "--html /none/page.html: No such file"),
        ([*ARGUMENTS, "--calibration", "none"], "no calibration"),
        (["plan", "calibrate", "none", "--model", "tiny-9m", "--gpu", "epyc-2", "--out", "x"],
         "none: No such file"),
        (["plan", "capacity", "--gpu", "l4"], "no price of l4"),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert error.count("\n") == 1
