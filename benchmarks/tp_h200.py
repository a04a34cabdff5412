"""Several GPUs of one host: whether ranks are correct, the cost of all-reduces, the speed-up.

    python benchmarks/tp_h200.py --gpus 4 --phases sums,correctness,shapes,dp,parallelism
    python benchmarks/tp_h200.py --gpus 2 --phases sums,correctness
    python benchmarks/tp_h200.py --dry-run          # every phase, small, on any machine

Phases, each in processes of its own (`tp_children.py`) with a limit of time. Those that need few
GPUs run side by side; results are in --out as soon as their process has ended:

  sums         every all-reduce at 4 KiB .. 4 MiB, over 2 ranks and over all: raw, in a CUDA graph,
               with the norm; and NCCL between graphs of the norm
  correctness  log-probabilities and greedy tokens of TP against one GPU, beside one GPU's noise
  shapes       27B-FP8 shapes on seeded random weights, one draft accepted at 0.9: steady decoding
               at batch 1, 8, 32 and 256 for TP = 1 and 2, side by side, then 4
  dp           the largest batch on as many engines as GPUs at once, against TP=1 of shapes, or
               against one engine alone (--dp-alone): efficiency
  parallelism  `millrace bench parallelism millrace-mini`: the table with accuracy

NVLink multicast stays off throughout.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "src")]

import torch  # noqa: E402
from engine_runs import commit  # noqa: E402
from model_shapes import write_config  # noqa: E402

from millrace.bench.report.tables import aligned  # noqa: E402
from millrace.model.tiny import TinyShape, write_checkpoint  # noqa: E402

ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])),
}
# Seconds for the processes of a phase that run side by side.
LIMITS = {"sums": 70, "correctness": 80, "shapes": 115, "dp": 100, "parallelism": 80}
# Heads for four ranks, and an MLP of five FP8 blocks, which no number of ranks divides.
WIDE = TinyShape(num_heads=8, num_kv_heads=4, key_heads=4, value_heads=8, fp8=True)


# --- processes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A process to run on some GPUs; what it found comes from a file named after `name`."""

    name: str
    gpus: Sequence[int]
    command: list[str]


class Bench:
    """Runs jobs, and keeps what they found in the output file."""

    def __init__(self, options: argparse.Namespace, models: dict[str, str], scratch: Path) -> None:
        self.options, self.models, self.scratch = options, models, scratch
        self.out: dict[str, Any] = {}

    def child(self, name: str, gpus: Sequence[int], kind: str, **given: Any) -> Job:
        command = [sys.executable, str(ROOT / "benchmarks/tp_children.py"), kind]
        for key, value in given.items():
            command += [f"--{key}", str(value)]
        command += ["--dry-run"] if self.options.dry_run else []
        return Job(name, gpus, [*command, "--result", str(self.file(name))])

    def file(self, name: str) -> Path:
        return self.scratch / f"{name}.json"

    def run(self, phase: str, jobs: Sequence[Job]) -> dict[str, Any]:
        """What each job found, by name; all run at once and have the phase's limit of time."""
        limit = LIMITS[phase]
        began = time.monotonic()
        processes = [self._start(job) for job in jobs]
        found = {}
        for job, process in zip(jobs, processes, strict=True):
            problem = self._end(process, began + limit - time.monotonic(), limit)
            file = self.file(job.name)
            found[job.name] = json.loads(file.read_text()) if file.exists() else {}
            if problem:
                found[job.name]["error"] = problem
                print(f"{job.name}: {problem}\n{self._last_lines(job, 12)}", flush=True)
        return found

    def _start(self, job: Job) -> subprocess.Popen[bytes]:
        self.file(job.name).unlink(missing_ok=True)
        env = {**os.environ, **ENVIRONMENT}
        if self.options.dry_run:
            env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        else:
            env |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, job.gpus))}
        with open(self.scratch / f"{job.name}.log", "wb") as log:
            return subprocess.Popen(
                job.command, env=env, stdout=log, stderr=log, start_new_session=True
            )

    @staticmethod
    def _end(process: subprocess.Popen[bytes], left: float, limit: float) -> str | None:
        """Wait for a process and end all that it started. What went wrong, or None."""
        try:
            status = process.wait(max(0.0, left))
            problem = f"ended with status {status}" if status else None
        except subprocess.TimeoutExpired:
            problem = f"took longer than {limit:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return problem

    def _last_lines(self, job: Job, count: int) -> str:
        lines = (self.scratch / f"{job.name}.log").read_text(errors="replace").splitlines()
        return "\n".join(f"  | {line[:200]}" for line in lines[-count:])

    def keep(self, phase: str, found: Any) -> None:
        """Write everything so far."""
        self.out[phase] = found
        path = self.options.out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.out, indent=1) + "\n")


# --- phases ------------------------------------------------------------------------------------


def phase_sums(bench: Bench) -> None:
    from millrace.runtime.ranks.allreduce import Timing, table

    found: dict[str, Any] = {}
    for ranks in sorted({2, bench.options.gpus}, reverse=True):
        name = f"sums-{ranks}"
        found[str(ranks)] = bench.run(
            "sums", [bench.child(name, range(ranks), "sums", ranks=ranks)]
        )[name]
        bench.keep("sums", found)
        print(f"{ranks} ranks", flush=True)
        print(table([Timing(**row) for row in found[str(ranks)].get("table", [])]), flush=True)


def phase_correctness(bench: Bench) -> None:
    """TP against one GPU; noise: one GPU against itself, with prompts in chunks."""

    def job(model: str, ranks: int, first: int, **given: Any) -> Job:
        name = f"{model}-{ranks}" + ("-chunks" if given else "")
        gpus = range(first, first + ranks)
        return bench.child(name, gpus, "outputs", ranks=ranks, model=bench.models[model], **given)

    most = bench.options.gpus
    names = ("mini", "wide")
    single = [job(name, 1, 2 * at % most) for at, name in enumerate(names)]
    single += [job(name, 1, (2 * at + 1) % most, chunk=32) for at, name in enumerate(names)]
    pairs = [job(name, 2, 2 * at % most) for at, name in enumerate(names)]
    # Ranks do not share GPUs with others: kernels that wait for each other would wait for turns.
    waves = [single, pairs] if most >= 4 else [single, *([pair] for pair in pairs)]
    waves += [[job("wide", most, 0)]] if most > 2 else []
    runs: dict[str, Any] = {}
    for wave in waves:
        runs |= bench.run("correctness", wave)
        found = {
            f"{name} TP={ranks}": compared(runs, name, ranks)
            for name in names
            for ranks in (2, 4)
            if f"{name}-{ranks}" in runs
        }
        bench.keep("correctness", found)
    for name, row in found.items():
        print(name, json.dumps(row), flush=True)


def compared(runs: dict[str, Any], name: str, ranks: int) -> dict[str, Any]:
    alone, chunked, together = (runs[f"{name}-{end}"] for end in ("1", "1-chunks", ranks))
    errors = [run["error"] for run in (alone, chunked, together) if "error" in run]
    if errors:
        return {"error": errors[0]}
    return {"tp": difference(alone, together), "noise": difference(alone, chunked)}


def difference(a: Any, b: Any) -> dict[str, float]:
    apart = [abs(x - y) for x, y in zip(a["logprobs"], b["logprobs"], strict=True)]
    same = [x == y for x, y in zip(a["tokens"], b["tokens"], strict=True)]
    return {
        "median_logprob": statistics.median(apart),
        "p99_logprob": sorted(apart)[int(0.99 * len(apart))],
        "max_logprob": max(apart),
        "equal_outputs": sum(same) / len(same),
    }


def phase_shapes(bench: Bench) -> None:
    options, found = bench.options, {}

    def job(ranks: int, first: int) -> Job:
        gpus = range(first, first + ranks)
        given = {"ranks": ranks, "model": bench.models["27b"], "batches": options.batches}
        return bench.child(f"TP={ranks}", gpus, "shapes", **given)

    if options.gpus >= 4:
        waves = [[job(1, 3), job(2, 0)], [job(4, 0)]]
    else:
        waves = [[job(1, 0)], [job(2, 0)]]
    for wave in waves:
        found |= bench.run("shapes", wave)
        base = found.get("TP=1", {}).get("batches", {})
        for record in found.values():
            for batch, row in record.get("batches", {}).items():
                if batch in base:
                    row["speedup"] = row["output_tok_s"] / base[batch]["output_tok_s"]
        bench.keep("shapes", found)
    print(shapes_table(found, bench.out.get("correctness", {})), flush=True)


def shapes_table(found: dict[str, Any], correctness: dict[str, Any]) -> str:
    """Speed of each arrangement, and beside it how right the same arrangement is."""
    headings = ("", "batch", "step ms", "tok/s", "of TP=1", "sums", "sum us", "accuracy")
    cells: list[Sequence[str]] = [headings]
    for name, record in sorted(found.items()):
        for batch, row in record.get("batches", {}).items():
            share, cost = row.get("sums_share"), row.get("sum_us")
            cells.append(
                (
                    name,
                    batch,
                    f"{row['step_ms']:.2f}",
                    f"{row['output_tok_s']:,.0f}",
                    f"{row['speedup']:.2f}" if "speedup" in row else "",
                    "" if share is None else f"{share:.1%}",
                    "" if cost is None else f"{cost:.1f}",
                    accuracy(name, correctness),
                )
            )
    return "\n".join(aligned(cells))


def accuracy(name: str, correctness: dict[str, Any]) -> str:
    """What a small model showed for this many ranks: that of FP8 blocks, or else millrace-mini."""
    if name == "TP=1":
        return "reference"
    rows = [(model, correctness.get(f"{model} {name}", {})) for model in ("wide", "mini")]
    model, row = next(((m, row) for m, row in rows if "tp" in row), rows[0])
    if "tp" not in row:
        return str(row.get("error", "not measured"))
    tp, noise = row["tp"], row["noise"]
    off, own = tp["median_logprob"], noise["median_logprob"]
    return (
        f"{model}: logprobs off by {off:.2g} (one GPU's noise {own:.2g}), "
        f"{tp['equal_outputs']:.0%} of outputs equal ({noise['equal_outputs']:.0%})"
    )


def phase_dp(bench: Bench) -> None:
    """The largest batch on every GPU at once, against one GPU."""
    options = bench.options
    batch = options.batches.split(",")[-1]
    given = {"ranks": 1, "model": bench.models["27b"], "batches": batch}
    jobs = [bench.child(f"dp-{gpu}", [gpu], "shapes", **given) for gpu in range(options.gpus)]

    def rates(found: dict[str, Any]) -> list[float]:
        return [run.get("batches", {}).get(batch, {}).get("output_tok_s") for run in found.values()]

    earlier = bench.out.get("shapes", {}).get("TP=1", {})
    reused = not options.dp_alone and batch in earlier.get("batches", {})
    alone = rates({"": earlier}) if reused else rates(bench.run("dp", jobs[:1]))
    found = {"alone": alone[0], "alone_from": "shapes, beside TP=2" if reused else "dp"}
    bench.keep("dp", found)
    found["each"] = rates(bench.run("dp", jobs))
    if alone[0] and all(found["each"]):
        found["efficiency"] = sum(found["each"]) / (options.gpus * alone[0])
        share = f"{found['efficiency']:.1%} of {options.gpus} times one"
        print(f"DP={options.gpus}: {share} ({found['alone_from']})", flush=True)
    bench.keep("dp", found)


def phase_parallelism(bench: Bench) -> None:
    from msgspec import convert

    from millrace.bench.runs.parallelism import ParallelRow, parallelism_fields, parallelism_table

    if bench.options.gpus >= 4:
        waves = [[("1x1", [2]), ("2x1", [0, 1])], [("1x4", range(4))], [("2x2", range(4))]]
    else:
        waves = [[("1x1", [0])], [("1x2", range(2))], [("2x1", range(2))]]
    rows: list[Any] = []
    problems = {}
    for wave in waves:
        jobs = [parallelism_job(bench, name, gpus) for name, gpus in wave]
        for name, found in bench.run("parallelism", jobs).items():
            rows += found.get("rows", [])
            problems |= {name: found["error"]} if "error" in found else {}
        measured = convert(rows, list[ParallelRow])
        bench.keep("parallelism", {"table": parallelism_fields(measured), "problems": problems})
    if any(row.runs for row in measured):
        print(parallelism_table(measured), flush=True)


def parallelism_job(bench: Bench, arrangement: str, gpus: Sequence[int]) -> Job:
    tiny = bench.options.dry_run
    name = f"parallelism-{arrangement}"
    command = [sys.executable, "-m", "millrace.cli", "bench", "parallelism", bench.models["mini"]]
    command += ["--arrangements", arrangement, "--random-output-len", "32", "--num-warmups", "2"]
    command += ["--num-prompts", "12" if tiny else "512"]
    command += ["--max-concurrency", "4" if tiny else "128"]
    command += ["--accuracy-items", "10" if tiny else "100", "--start-timeout", "60"]
    command += ["--result-dir", str(bench.scratch), "--result-filename", f"{name}.json"]
    command += ["--", "--max-model-len", "1024"]
    command += ["--device", "cpu", "--max-num-seqs", "8"] if tiny else []
    return Job(name, gpus, command)


# --- everything --------------------------------------------------------------------------------

PHASES: dict[str, Callable[[Bench], None]] = {
    "sums": phase_sums,
    "correctness": phase_correctness,
    "shapes": phase_shapes,
    "dp": phase_dp,
    "parallelism": phase_parallelism,
}


def make_models(parent: Path, dry_run: bool) -> dict[str, str]:
    wide = str(write_checkpoint(parent / "wide", WIDE, seed=5))
    large = wide if dry_run else str(write_config(parent / "qwen27b"))
    return {"mini": str(ROOT / "models/millrace-mini"), "wide": wide, "27b": large}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=2, choices=(2, 4))
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--dp-alone", action="store_true", help="measure one engine alone for dp")
    parser.add_argument("--batches")
    options = parser.parse_args()
    options.batches = options.batches or ("1,2" if options.dry_run else "1,8,32,256")
    unknown = [name for name in options.phases.split(",") if name not in PHASES]
    if unknown:
        parser.error(f"--phases: no {unknown[0]!r}; there are {', '.join(PHASES)}")
    name = "tp_dry_run.json" if options.dry_run else f"tp_h200_x{options.gpus}.json"
    place = Path(tempfile.gettempdir()) if options.dry_run else ROOT / "benchmarks/results"
    options.out = options.out or place / name
    return options


def main() -> None:
    options = parse_options()
    device = "cpu" if options.dry_run else torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        bench = Bench(options, make_models(scratch, options.dry_run), scratch)
        bench.out = json.loads(options.out.read_text()) if options.out.exists() else {}
        bench.out |= {"commit": commit(), "device": device, "torch": torch.__version__}
        for phase in options.phases.split(","):
            began = time.perf_counter()
            print(f"-- {phase}", flush=True)
            PHASES[phase](bench)
            print(f"-- {phase}: {time.perf_counter() - began:.0f} s", flush=True)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
