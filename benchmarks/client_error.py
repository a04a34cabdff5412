"""Load generators against a server with known times: what they report, compared with the truth.

The server is `benchmarks/mock/mock.c`, compiled here. It streams chunks at a fixed pace and records
when the kernel received each request and when each chunk was sent. The same formulas give the true
TTFT, TPOT, ITL and throughput from that, and every client's report is compared with them. CPU time
is that of the client's process tree, minus that of the same command with a handful of requests.

    python benchmarks/client_error.py --streams 256,1024 --repeats 3 \
        --vllm /path/to/vllm --guidellm /path/to/guidellm --aiperf /path/to/aiperf

Other load generators are measured where their command is given. Repeats are interleaved; figures
are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = str(ROOT / "models" / "millrace-mini")
INPUT = 256
FIGURES = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "itl_p50", "itl_p99", "throughput")


@dataclass
class Load:
    """What every client is asked to do: `requests` of `tokens` chunks, `streams` at a time."""

    port: int
    streams: int
    requests: int
    tokens: int
    directory: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass
class Result:
    """One client at one level: reported and true figures of each repeat (ms, tokens/s)."""

    client: str
    streams: int
    reported: list[dict[str, float]] = field(default_factory=list)
    true: list[dict[str, float]] = field(default_factory=list)
    us_per_chunk: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    load_average: list[float] = field(default_factory=list)
    marked: list[bool] = field(default_factory=list)
    problem: str | None = None

    def error(self, figure: str) -> float | None:
        """The median relative error over the repeats; None where the client does not report it."""
        pairs = [
            (said[figure], was[figure])
            for said, was in zip(self.reported, self.true, strict=True)
            if figure in said
        ]
        return statistics.median(said / was - 1 for said, was in pairs) if pairs else None


# --- the clients: a command, and where its figures are ----------------------------------------


def millrace(processes: int) -> tuple[Callable[[Load], list[str]], Callable[[Load], Any]]:
    def command(load: Load) -> list[str]:
        return [
            *(sys.executable, "-m", "millrace.cli", "bench", "serve", "--base-url", load.url),
            *("--num-prompts", str(load.requests), "--max-concurrency", str(load.streams)),
            *("--random-input-len", str(INPUT), "--random-output-len", str(load.tokens)),
            *("--metric-percentiles", "50,99", "--raw", "none", "--processes", str(processes)),
            *("--result-dir", str(load.directory), "--result-filename", "r.json"),
        ]

    return command, _vllm_figures


def vllm(program: str) -> Callable[[Load], list[str]]:
    def command(load: Load) -> list[str]:
        return [
            *(program, "bench", "serve", "--backend", "openai", "--base-url", load.url),
            *("--endpoint", "/v1/completions", "--model", "mock", "--tokenizer", TOKENIZER),
            *("--dataset-name", "random", "--random-input-len", str(INPUT)),
            *("--random-output-len", str(load.tokens), "--ignore-eos"),
            *("--num-prompts", str(load.requests), "--max-concurrency", str(load.streams)),
            *("--metric-percentiles", "50,99", "--save-result", "--disable-tqdm"),
            *("--result-dir", str(load.directory), "--result-filename", "r.json"),
        ]

    return command


def _vllm_figures(load: Load) -> dict[str, Any]:
    got = json.loads((load.directory / "r.json").read_text())
    figures = {
        f"{name}_{p}": got[f"{p}_{name}_ms"] for name in ("ttft", "tpot", "itl") for p in _PS
    }
    bound = bool(got.get("client", {}).get("client_bound"))
    return {**figures, "throughput": got["output_throughput"], "marked": bound}


_PS = ("p50", "p99")


def guidellm(program: str) -> Callable[[Load], list[str]]:
    def command(load: Load) -> list[str]:
        data = f"kind=synthetic_text,prompt_tokens={INPUT},output_tokens={load.tokens}"
        return [
            *(program, "run", "--disable-console"),
            *("--backend", f"kind=openai_http,target={load.url},request_format=/v1/completions"),
            *("--profile", f"kind=concurrent,streams={load.streams}"),
            *("--constraint", f"kind=max_requests,count={load.requests}"),
            *("--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}", "--data", data),
            *("--output", f"kind=json,path={load.directory / 'g.json'}"),
        ]

    return command


def _guidellm_figures(load: Load) -> dict[str, Any]:
    run = json.loads((load.directory / "g.json").read_text())["benchmarks"][0]["metrics"]

    def of(name: str) -> dict[str, float]:
        found: dict[str, float] = run[name]["successful"]["percentiles"]
        return found

    names = {
        "ttft": "time_to_first_token_ms",
        "tpot": "time_per_output_token_ms",
        "itl": "inter_token_latency_ms",
    }
    figures = {f"{short}_{p}": of(name)[p] for short, name in names.items() for p in _PS}
    return {**figures, "throughput": run["output_tokens_per_second"]["successful"]["mean"]}


def aiperf(program: str) -> Callable[[Load], list[str]]:
    def command(load: Load) -> list[str]:
        return [
            *(program, "profile", "-m", "mock", "--url", load.url, "--streaming"),
            *("--endpoint-type", "completions", "--tokenizer", TOKENIZER),
            *("--concurrency", str(load.streams), "--request-count", str(load.requests)),
            *("--synthetic-input-tokens-mean", str(INPUT)),
            *("--synthetic-input-tokens-stddev", "0", "--output-tokens-mean", str(load.tokens)),
            *("--output-tokens-stddev", "0", "--artifact-dir", str(load.directory / "aiperf")),
            *("--ui", "none", "--use-server-token-count"),
        ]

    return command


def _aiperf_figures(load: Load) -> dict[str, Any]:
    (file,) = (load.directory / "aiperf").rglob("profile_export_aiperf.json")
    got = json.loads(file.read_text())
    figures = {}
    # AIPerf's inter_token_latency is a mean for each request: what is TPOT here.
    for short, name in (("ttft", "time_to_first_token"), ("tpot", "inter_token_latency")):
        figures |= {f"{short}_{p}": got[name][p] for p in _PS if name in got}
    return {**figures, "throughput": got["output_token_throughput"]["avg"]}


# --- the truth --------------------------------------------------------------------------------


@contextmanager
def mock(program: Path, log: Path, first_ms: float, gap_ms: float) -> Iterator[int]:
    """The mock in a process of its own: its port. Its log is whole when the context ends."""
    process = subprocess.Popen(
        [str(program), "0", str(first_ms), str(gap_ms), str(log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline().rsplit(" ", 1)[1])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def truth(log: Path, requests: int) -> dict[str, float]:
    """The true figures of the last `requests` requests (what came before was warm-up)."""
    rows = sorted([int(x) for x in line.split()] for line in log.read_text().splitlines())
    rows = rows[-requests:]
    times = [np.array(row) for row in rows]
    ttft = np.array([t[1] - t[0] for t in times]) / 1e6
    tpot = np.array([(t[-1] - t[1]) / (len(t) - 2) for t in times]) / 1e6
    itl = np.concatenate([np.diff(t[1:]) for t in times]) / 1e6
    seconds = (max(t[-1] for t in times) - min(t[0] for t in times)) / 1e9
    figures = {"throughput": sum(len(t) - 1 for t in times) / seconds}
    for name, values in (("ttft", ttft), ("tpot", tpot), ("itl", itl)):
        for percentile in (50, 99):
            figures[f"{name}_p{percentile}"] = float(np.percentile(values, percentile))
    return figures


# --- measuring --------------------------------------------------------------------------------


def timed(command: list[str], limit: float) -> tuple[float, float]:
    """CPU seconds of the command and all its children, and wall seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=limit,
        cwd=tempfile.gettempdir(),
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    if ended.returncode:
        lines = ended.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"status {ended.returncode}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, wall


def measure(
    program: Path,
    command: Callable[[Load], list[str]],
    figures: Callable[[Load], dict[str, Any]],
    streams: int,
    rounds: int,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, float], float, float]:
    """Reported figures, true ones, CPU seconds and wall seconds of one run."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        log = directory / "truth.log"
        with mock(program, log, options.first, options.gap) as port:
            load = Load(port, streams, rounds * streams, options.tokens, directory)
            cpu, wall = timed(command(load), options.limit)
        return figures(load), truth(log, load.requests), cpu, wall


def run(options: argparse.Namespace) -> list[Result]:
    clients: dict[str, tuple[Callable[[Load], list[str]], Callable[[Load], Any]]] = {
        "millrace bench": millrace(1),
        "millrace bench, 2 processes": millrace(2),
    }
    peers = (("vllm", vllm, _vllm_figures), ("guidellm", guidellm, _guidellm_figures))
    for name, make, read in (*peers, ("aiperf", aiperf, _aiperf_figures)):
        if program := getattr(options, name):
            clients[name] = (make(program), read)
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "mock"
        source = ROOT / "benchmarks" / "mock" / "mock.c"
        subprocess.run(["cc", "-O2", "-o", str(program), str(source)], check=True)
        return _measure_all(program, clients, options)


def _measure_all(
    program: Path, clients: dict[str, Any], options: argparse.Namespace
) -> list[Result]:
    levels = [int(part) for part in options.streams.split(",")]
    results = {(c, s): Result(c, s) for s in levels for c in clients}
    idle: dict[str, float] = {}
    for repeat in range(options.repeats):
        for (name, streams), result in results.items():
            if result.problem:
                continue
            command, figures = clients[name]
            try:
                if name not in idle:  # what starting it costs
                    idle[name] = measure(program, command, figures, 8, 1, options)[2]
                said, was, cpu, wall = measure(
                    program, command, figures, streams, options.rounds, options
                )
            except (RuntimeError, OSError, KeyError, ValueError, subprocess.TimeoutExpired) as e:
                result.problem = f"{type(e).__name__}: {e}"[:300]
                print(f"{name}, {streams} streams: {result.problem}", file=sys.stderr)
                continue
            chunks = options.rounds * streams * options.tokens
            result.marked.append(bool(said.pop("marked", False)))
            result.reported.append(said)
            result.true.append(was)
            result.us_per_chunk.append(1e6 * (cpu - idle[name]) / chunks)
            result.wall_s.append(wall)
            result.load_average.append(os.getloadavg()[0])
            print(f"run {repeat + 1}: {name}, {streams} streams: {wall:.0f} s", file=sys.stderr)
    return list(results.values())


def table(results: list[Result]) -> str:
    head = ("client", "streams", "us/chunk", *(f.replace("_", " ").upper() for f in FIGURES))
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in results:
        if not r.reported:
            lines.append(f"| {r.client} | {r.streams} | {r.problem} |" + " |" * (len(head) - 3))
            continue
        errors = [r.error(figure) for figure in FIGURES]
        cells = [f"{100 * e:+.1f}%" if e is not None else "" for e in errors]
        cost = f"{statistics.median(r.us_per_chunk):.1f}"
        lines.append(f"| {r.client} | {r.streams} | {cost} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", default="256,1024")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="requests of each stream")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--first", type=float, default=50.0, help="ms to the first chunk")
    parser.add_argument("--gap", type=float, default=50.0, help="ms between chunks")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one run")
    for peer in ("vllm", "guidellm", "aiperf"):
        parser.add_argument(f"--{peer}", help=f"{peer}'s command, to measure it too")
    parser.add_argument("--json", type=Path, help="write every repeat here")
    options = parser.parse_args()
    if shutil.which("cc") is None:
        raise SystemExit("a C compiler named cc is needed to build the mock")
    results = run(options)
    print(table(results))
    if options.json:
        settings = {k: str(v) for k, v in vars(options).items() if k not in ("json",)}
        rows = [asdict(result) for result in results]
        options.json.write_text(json.dumps({"options": settings, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
