"""`millrace bench serve` and `vllm bench serve` on one server, in alternating runs: do they agree?

    millrace serve millrace-mini --port 8000
    python benchmarks/client_agreement.py --port 8000 --vllm /path/to/vllm --repeats 4

With `--echo SECONDS` the script starts the server itself, with the echo engine of the tests. Its
steps take that time, whatever else the machine does.

Prints, for every figure that both report, the ratio of vLLM's to Millrace's with its 95% interval.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from millrace.bench.report.compare import HIGHER, LOWER, ratio_of
from millrace.bench.report.tables import aligned
from tests.support.fake_engine import Behaviour
from tests.support.live_server import fake_server
from tests.support.text_model import write_text_model

ROOT = Path(__file__).resolve().parents[1]
COMMON = ("--random-range-ratio", "0", "--ignore-eos", "--metric-percentiles", "99")
METRICS = ("--percentile-metrics", "ttft,tpot,itl,e2el")


def load(options: argparse.Namespace, seed: int) -> list[str]:
    return [
        *("--base-url", f"http://127.0.0.1:{options.port}"),
        *("--num-prompts", str(options.requests), "--max-concurrency", str(options.concurrency)),
        *("--random-input-len", str(options.input), "--random-output-len", str(options.output)),
        *("--num-warmups", "8", "--seed", str(seed), "--save-result"),
        *(*COMMON, *METRICS),
    ]


def measure(command: list[str], seed: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        place = ["--result-dir", directory, "--result-filename", "r.json"]
        ended = subprocess.run(
            [*command, *load(options, seed), *place],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=600,
            cwd=directory,
        )
        if ended.returncode:
            raise SystemExit(f"{command[0]}: {ended.stderr.strip().splitlines()[-1]}")
        fields: dict[str, Any] = json.loads((Path(directory) / "r.json").read_text())
        return fields


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--vllm", required=True, help="vllm's command")
    parser.add_argument("--model", default="millrace-mini")
    parser.add_argument("--tokenizer", default=str(ROOT / "models" / "millrace-mini"))
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--echo", type=float, help="seconds a step of the echo engine")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.echo is None:
        report(options)
        return
    with tempfile.TemporaryDirectory() as name:
        model = write_text_model(Path(name) / "model")
        engine = {"max_num_seqs": 2 * options.concurrency, "max_model_len": 4096}
        behaviour = Behaviour(step=options.echo)
        with fake_server(model, Path(name) / "log", behaviour, **engine) as server:
            options.port = int(server.url.rsplit(":", 1)[1])
            options.model = "fake"
            report(options)


def report(options: argparse.Namespace) -> None:
    ours = [sys.executable, "-m", "millrace.cli", "bench", "serve", "--raw", "none"]
    theirs = [options.vllm, "bench", "serve", "--backend", "openai", "--model", options.model]
    theirs += ["--endpoint", "/v1/completions", "--tokenizer", options.tokenizer]
    runs: dict[str, list[dict[str, Any]]] = {"millrace": [], "vllm": []}
    for repeat in range(options.repeats):
        # Each seed is used once, so that no prefix cache knows a prompt; the order alternates.
        pair = [("millrace", ours, 1000 + repeat), ("vllm", theirs, 2000 + repeat)]
        for name, command, seed in pair if repeat % 2 == 0 else pair[::-1]:
            runs[name].append(measure(command, seed, options))
            print(f"run {repeat + 1} of {name}", file=sys.stderr)
    rows = [("figure", "millrace", "vllm", "vllm / millrace", "95% interval", "differ")]
    for figure in (*HIGHER, *LOWER):
        values = [[run.get(figure) for run in runs[name]] for name in ("millrace", "vllm")]
        if all(v for side in values for v in side):
            r = ratio_of(figure, *values)
            interval = f"{r.low:.3f} .. {r.high:.3f}" if r.low is not None else ""
            told = "yes" if r.differs else "not shown"
            rows.append((figure, f"{r.a:.2f}", f"{r.b:.2f}", f"{r.ratio:.3f}", interval, told))
    print("\n".join(aligned(rows)))
    if options.json:
        content = {"requests": options.requests, "concurrency": options.concurrency, "runs": runs}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
