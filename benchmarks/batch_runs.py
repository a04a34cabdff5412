"""`millrace batch`: against a closed loop, beside other users' streams, its memory, and vLLM's.

    python benchmarks/batch_runs.py --what speed,beside,memory
    python benchmarks/batch_runs.py --what vllm --vllm-env /tmp/vllm-env   # as cpu_vs_vllm.py makes

speed: the same requests through `batch` and `bench serve`, by turns, on one server. beside: ITL p99
of four streams with batch work beside them and without, by turns. memory: the runner's peak over
files of two sizes, on servers that answer at once. vllm: chats, each command with an engine
of its own, with its start; peak memory of all of its processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from batch_kills import peak_mib, write_documents  # noqa: E402

from millrace.batch.journal import read_counts  # noqa: E402
from tests.batch.counting_server import CountingServer  # noqa: E402
from tests.support.live_server import LiveServer, started  # noqa: E402

MILLRACE = (sys.executable, "-m", "millrace.cli")
IN_FLIGHT = 32
OUTPUT = 48  # tokens of an answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="speed,beside,memory")
    parser.add_argument("--model", default="millrace-mini")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--vllm-env", type=Path)
    options = parser.parse_args()
    parts: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
        "speed": speed, "beside": beside, "memory": memory, "vllm": against_vllm,
    }  # fmt: skip
    for name in options.what.split(","):
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"what": name, **parts[name](options, Path(folder))}), flush=True)


# --- the same server, by turns ------------------------------------------------------------------


def speed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Output tokens a second of the closed loop, and of the batch over it."""
    rates: dict[str, list[float]] = {"bench serve": [], "batch": []}
    with serving(options.model, folder) as server:
        for turn in range(-1, options.turns):  # the first warms up
            closed = closed_loop(server, folder, texts_of(turn, 1000, options.requests))
            batched = batch_rate(server, folder, texts_of(turn, 5000, options.requests), turn)
            if turn >= 0:
                rates["bench serve"].append(closed)
                rates["batch"].append(batched)
    ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
    return {**rates, "batch over bench serve": round(statistics.median(ratios), 3)}


def texts_of(turn: int, first: int, count: int) -> list[str]:
    """Of one length, and no two alike, whatever comes first."""
    return [f"Turn {turn % 10}, number {first + n}: {'a word ' * 24}" for n in range(count)]


@contextlib.contextmanager
def serving(model: str, folder: Path) -> Iterator[LiveServer]:
    command = [*MILLRACE, "serve", model, "--port=0"]
    with started(command, folder / "server.log") as server:
        server.wait_ready(300)
        yield server


def closed_loop(server: LiveServer, folder: Path, texts: list[str]) -> float:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    words = ["--dataset-name", "custom", "--dataset-path", str(path)]
    found = bench(server, folder, len(texts), IN_FLIGHT, words)
    return float(found["output_throughput"])


def bench(
    server: LiveServer, folder: Path, prompts: int, concurrency: int, words: list[str]
) -> dict[str, Any]:
    """The results of a closed loop of completions, OUTPUT tokens each."""
    result = folder / "bench.json"
    subprocess.run(
        [
            *MILLRACE, "bench", "serve", "--base-url", server.url, "--num-prompts", str(prompts),
            "--max-concurrency", str(concurrency), "--custom-output-len", str(OUTPUT),
            "--ignore-eos", *words, "--save-result", "--result-dir", str(folder),
            "--result-filename", result.name,
        ],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=900,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def write_chats(path: Path, texts: list[str], model: str) -> None:
    """vLLM's run-batch takes no completions."""
    with path.open("w") as file:
        for number, text in enumerate(texts):
            said = [{"role": "user", "content": text}]
            body = {"model": model, "messages": said, "max_tokens": OUTPUT, "ignore_eos": True}
            line = {"custom_id": f"{number}", "method": "POST", "url": "/v1/chat/completions"}
            file.write(json.dumps({**line, "body": body}) + "\n")


def write_completions(path: Path, texts: list[str], **body: Any) -> None:
    with path.open("w") as file:
        for number, text in enumerate(texts):
            whole = {"model": "any", "prompt": text, "max_tokens": OUTPUT, "ignore_eos": True}
            line = {"custom_id": f"{number}", "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps({**line, "body": {**whole, **body}}) + "\n")


def batch_rate(server: LiveServer, folder: Path, texts: list[str], turn: int) -> float:
    """By the journal's own clock, which runs while requests do."""
    write_completions(folder / "in.jsonl", texts)
    output = folder / f"out{turn}.jsonl"
    subprocess.run(batch_command(server, folder / "in.jsonl", output), check=True, timeout=900)
    counts = read_counts(output)
    assert counts.done == len(texts)
    assert not counts.failed
    return counts.usage.output / counts.seconds


def batch_command(server: LiveServer, source: Path, output: Path) -> list[str]:
    return [
        *MILLRACE, "batch", "-i", str(source), "-o", str(output), "--base-url", server.url,
        "--model", served(server), "--max-in-flight", str(IN_FLIGHT),
    ]  # fmt: skip


def served(server: LiveServer) -> str:
    """The name of its model."""
    return str(httpx.get(f"{server.url}/v1/models", timeout=10).json()["data"][0]["id"])


# --- streams beside a batch -----------------------------------------------------------------------


def beside(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """ITL p99 in ms of four streams."""
    found: dict[str, list[float]] = {"alone": [], "beside a batch": []}
    with serving(options.model, folder) as server:
        for turn in range(-1, options.turns):
            for name in found:
                with working(server, folder, turn) if name != "alone" else contextlib.nullcontext():
                    words = ["--seed", str(2 * turn + 7 + (name == "alone")), "--random-input-len",
                             "48", "--random-output-len", str(OUTPUT)]  # fmt: skip
                    p99 = float(bench(server, folder, 64, 4, words)["p99_itl_ms"])
                if turn >= 0:
                    found[name].append(round(p99, 2))
    ratios = [b / a for a, b in zip(*found.values(), strict=True)]
    return {**found, "beside over alone": round(statistics.median(ratios), 3)}


@contextlib.contextmanager
def working(server: LiveServer, folder: Path, turn: int) -> Iterator[None]:
    """A batch that is longer than what runs beside it."""
    write_completions(folder / "long.jsonl", [f"{turn} {n} {'word ' * 30}" for n in range(20_000)])
    command = batch_command(server, folder / "long.jsonl", folder / f"long{turn}.jsonl")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    time.sleep(3)
    try:
        yield
        assert process.poll() is None, "the batch ended first"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


# --- memory -----------------------------------------------------------------------------------


def memory(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peak MiB of the runner over files of 5,000 and of 50,000 documents."""
    found = {}
    with CountingServer().running() as server:
        for count in (5_000, 50_000):
            source, output = folder / f"{count}.jsonl", folder / f"{count}.out.jsonl"
            write_documents(source, count)
            files = ["-i", str(source), "-o", str(output)]
            command = [*MILLRACE, "batch", *files, "--base-url", server.url]
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            peak = 0.0
            while process.poll() is None:
                peak = max(peak, peak_mib(process.pid))
                time.sleep(0.05)
            size = source.stat().st_size / 2**20
            found[f"{count} documents, {size:.0f} MiB"] = round(peak, 1)
    return found


# --- vLLM's run-batch -------------------------------------------------------------------------


def against_vllm(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds and peak MiB of the whole command, for two sizes of the file."""
    if options.vllm_env is None:
        raise SystemExit("--vllm-env: where cpu_vs_vllm.py --setup has put it")
    model = ROOT / "models" / options.model
    found: dict[str, Any] = {}
    for count in (options.requests, 4 * options.requests):
        source = folder / f"{count}.jsonl"
        texts = [f"number {n}: {'a word ' * 24}" for n in range(count)]
        write_chats(source, texts, str(model))
        for name, command in commands(options.vllm_env, model, source).items():
            found[f"{name}, {count}"] = whole_run(command)
    return found


def commands(env: Path, model: Path, source: Path) -> dict[str, list[str]]:
    files = ["-i", str(source), "-o"]
    vllm = [str(env / "bin" / "vllm"), "run-batch", *files, str(source.with_suffix(".vllm"))]
    length = ["--model", str(model), "--max-model-len", "512"]
    return {
        "vllm run-batch": [*vllm, *length, "--max-num-seqs", str(IN_FLIGHT)],
        "millrace batch": [
            *MILLRACE, "batch", *files, str(source.with_suffix(".millrace")), *length,
            "--max-num-seqs", str(IN_FLIGHT),
        ],
    }  # fmt: skip


def whole_run(command: list[str]) -> dict[str, Any]:
    """Peak memory: of the process and its children together."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "2"}
    began, peak = time.monotonic(), 0.0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while process.poll() is None:
            peak = max(peak, together(process.pid))
            time.sleep(0.2)
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
    if process.returncode:
        return {"failed": lines[-1:] or process.returncode}
    return {"seconds": round(time.monotonic() - began, 1), "peak MiB": round(peak)}


def together(pid: int) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        whole = psutil.Process(pid)
        members = [whole, *whole.children(recursive=True)]
        return sum(one.memory_info().rss for one in members) / 2**20
    return 0.0


if __name__ == "__main__":
    main()
