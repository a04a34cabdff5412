"""A pure attention model without a draft head through every command: doctor, serve, bench, eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from millrace.model.tiny import FP8_BLOCKS, QWEN3, write_checkpoint
from tests.support.live_server import LiveServer, started

CONFIG = {
    **QWEN3, "hidden_size": 128, "head_dim": 128, "num_hidden_layers": 2, "dtype": "bfloat16",
    "quantization_config": FP8_BLOCKS,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a model that is then known by name, here and to child processes."""
    parent = tmp_path_factory.mktemp("models")
    write_checkpoint(parent / "tiny-qwen3", CONFIG)
    old = os.environ.get("MILLRACE_MODELS")
    os.environ["MILLRACE_MODELS"] = str(parent)
    yield parent
    del os.environ["MILLRACE_MODELS"]
    if old is not None:
        os.environ["MILLRACE_MODELS"] = old


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[LiveServer]:
    command = [
        sys.executable, "-m", "millrace.cli", "serve", "tiny-qwen3", "--port=0",
        "--max-model-len=512", "--max-num-seqs=4", "--kv-cache-memory-bytes=16000000",
        "--mamba-ssm-cache-dtype=bfloat16",
    ]  # fmt: skip
    with started(command, models / "log") as running:
        running.wait_ready(120)
        yield running


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "millrace.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_conversation_resumes_at_the_last_whole_page(server: LiveServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    create: Any = client.chat.completions.create
    chat: list[Any] = [{"role": "user", "content": "one " * 12}]
    usages = []
    for _ in range(2):
        answer = create(model="tiny-qwen3", messages=chat, temperature=0, max_tokens=8)
        usages.append(answer.usage)
    first, second = usages
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == (second.prompt_tokens - 1) // 16 * 16


def test_the_start_says_what_runs(server: LiveServer) -> None:
    assert "FP8 weights become bfloat16: a CPU has no FP8 GEMM" in server.log
    assert "drafts: none" in server.log
    assert (
        "mamba_ssm_cache_dtype: no effect, because this model has no recurrent state" in server.log
    )
    assert "tokens; cached prompts resume at any page" in server.log


def test_bench_and_eval_measure_it(server: LiveServer, models: Path) -> None:
    result = models / "bench.json"
    run(
        "bench", "serve", "--base-url", server.url, "--num-prompts=4", "--random-input-len=30",
        "--random-output-len=4", f"--result-dir={models}", "--save-result",
        "--result-filename=bench.json",
    )  # fmt: skip
    assert json.loads(result.read_text())["completed"] == 4
    run("eval", "--base-url", server.url, "--tasks=math", "--num-items=2", "--max-tokens=4")


def test_doctor_names_the_family(models: Path) -> None:
    report = json.loads(run("doctor", "tiny-qwen3", "--port=0", "--json=-"))
    found = {one["name"]: one["value"] for one in report["findings"] if one["topic"] == "model"}
    assert found["shape"].startswith("Qwen3 dense, 2 layers of 128, bfloat16 and FP8")
    assert "0 draft tokens" in found["options"]


@pytest.mark.sweep  # the error is shown by the engine's tests, the one line by other errors
def test_drafts_are_refused_in_one_line(models: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "millrace.cli", "serve", "tiny-qwen3", "--port=0",
        '--speculative-config={"num_speculative_tokens": 1}',
    ]  # fmt: skip
    with started(command, tmp_path / "log") as server:
        assert server.process.wait(60) == 2
        (line,) = server.log.splitlines()
        assert "this checkpoint has no MTP head; leave it out" in line
