"""`millrace simulate`: what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from millrace.cli import run

SMALL = (
    *("simulate", "--num-prompts", "20", "--max-concurrency", "8", "--random-input-len", "64"),
    *("--random-output-len", "16", "--max-num-seqs", "16"),
)


def test_a_run_is_a_table_a_json_file_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, data = tmp_path / "run.html", tmp_path / "run.json"
    assert run([*SMALL, "--html", str(page), "--json", str(data), "--price", "4.5"]) == 0
    assert "20 completed, 0 failed" in capsys.readouterr().out
    found = json.loads(data.read_text())
    assert found["completed"] == 20
    assert found["total_output_tokens"] == 320
    assert found["total_token_throughput"] == pytest.approx(20 * 80 / found["duration"])
    assert found["dollars_per_million_tokens"] > 0
    assert found["time_line"]
    html = page.read_text()
    assert html.startswith("<!doctype html>")
    assert "<svg" in html
    assert "<script" not in html
    assert "http" not in html.replace("http://www.w3.org", "")


def test_equal_seeds_bring_equal_results(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        path = tmp_path / name
        assert run([*SMALL, "--replicas", "2", "--jitter", "0.1", "--json", str(path)]) == 0
        one = json.loads(path.read_text())
        del one["wall_seconds"]
        found.append(one)
    assert found[0] == found[1]


def test_beyond_the_knee_no_ttft_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "run.json"
    too_fast = ["simulate", "--random-input-len", "512", "--random-output-len", "64"]
    too_fast += ["--request-rate", "40", "--num-prompts", "900", "--max-num-seqs", "8"]
    too_fast += ["--duration", "12", "--json", str(data)]
    assert run(too_fast) == 0
    assert "cannot keep up" in capsys.readouterr().out
    found = json.loads(data.read_text())
    assert found["saturated"]
    assert found["median_ttft_ms"] is None
    assert found["median_tpot_ms"] > 0


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--replicas", "0"], "--replicas 0: use 1 or more"),
        (["--gpu", "h900"], "h900"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--step-model", "/nowhere/steps.json"], "no step model"),
        (["--autoscale", "3:1:100"], "use LEAST:MOST:TARGET"),
        (["--kill", "7@x"], "use REPLICA@SECONDS"),
        (["--acceptance", "1.5", "--drafts", "1"], "from 0 to 1"),
        (["--num-pages", "3"], "pages"),
        (["--max-num-batched-tokens", "100"], "use 256 or more"),
        (["--request-rate", "-1"], "--request-rate"),
        (["--dataset-name", "trace"], "give --dataset-path"),
        (["--goodput", "speed:3"], "--goodput"),
        (["--json", "/nowhere/run.json"], "no such directory"),
        (["--duration", "10", "--warmup", "10"], "--warmup"),
        (["--policy", "best"], "best"),
        (["--prefill-replicas", "1"], "use fewer than --replicas 1"),
        (["--link", "0"], "--link 0: use a number above 0"),
        (
            ["--replicas", "2", "--prefill-replicas", "1", "--mode", "aggregated"],
            "use event with --prefill-replicas",
        ),
    ],
)
def test_bad_input_is_one_line(
    flags: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("millrace simulate: ")
    assert wanted in said
