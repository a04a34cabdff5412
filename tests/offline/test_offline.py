"""`bench throughput` and `bench latency` on a tiny model: figures that hang together."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from millrace.cli import run

ENGINE = [
    *("--dtype=float32", "--max-model-len=128", "--max-num-seqs=4", "--max-num-batched-tokens=64"),
    *("--kv-cache-memory-bytes=16M", "--trust-remote-code"),
]


def test_throughput_counts_every_token(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "throughput.json"
    counts = ["--num-prompts=5", "--num-warmups=1", "--input-len=10", "--output-len=4", "--n=2"]
    where = ["--model", str(small_model), "--output-json", str(file)]
    assert run(["bench", "throughput", *where, *counts, *ENGINE]) == 0
    shown = capsys.readouterr()
    assert "without effect: --trust-remote-code" in shown.err
    assert "Total num prompt tokens:  50\nTotal num output tokens:  40\n" in shown.out
    found = json.loads(file.read_text())
    assert (found["num_requests"], found["total_num_tokens"]) == (5, 90)
    assert found["requests_per_second"] * found["elapsed_time"] == pytest.approx(5)
    assert found["tokens_per_second"] * found["elapsed_time"] == pytest.approx(90)
    total = float(re.findall(r"([\d.]+) total tokens/s", shown.out)[0])
    assert total == pytest.approx(found["tokens_per_second"], abs=0.01)


def test_latency_has_an_entry_for_each_iteration(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "latency.json"
    counts = ["--num-iters=3", "--num-iters-warmup=1", "--batch-size=2", "--output-len=4"]
    where = [str(small_model), "--output-json", str(file)]
    assert run(["bench", "latency", *where, *counts, *ENGINE]) == 0
    found = json.loads(file.read_text())
    latencies = sorted(found["latencies"])
    assert len(latencies) == 3
    assert found["avg_latency"] == pytest.approx(sum(latencies) / 3)
    assert list(found["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert found["percentiles"]["50"] == latencies[1]
    assert f"50% percentile latency: {latencies[1]} seconds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["throughput", "m", "--num-prompts=0"], "num_prompts 0: use 1 or more"),
        (["latency", "m", "--batch-size=0"], "batch_size 0: use 1 or more"),
        (["latency", "no such model"], "neither a directory nor a shipped model"),
        (["throughput", "m", "--enable-lora"], "LoRA adapters are not served"),
    ],
)
def test_what_cannot_work_gets_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
