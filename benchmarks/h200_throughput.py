"""Qwen3.5-27B-FP8 shapes on one GPU: throughput, latency, and where a step's time goes.

Seeded random weights (none of them zero by rounding), synthetic acceptance 0.9 with one draft,
temperature 1, token-id prompts with lengths uniform in [512, 1024], outputs uniform in [256, 512],
end tokens ignored: the workload that the figures of other engines in LEDGER.md were taken on. All
phases run in one process over one set of weights. Writes JSON and prints a table.

    python benchmarks/h200_throughput.py --out benchmarks/results/h200.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from qwen27b import write_config

from millrace.config import engine_args
from millrace.engine.engine import Engine
from millrace.engine.replica import build_engine
from millrace.protocol import AddRequest, SamplingParams

VOCAB = 248_000
BASE: dict[str, Any] = {
    "load_format": "dummy",
    "kv_cache_dtype": "fp8_e4m3",
    "max_model_len": 2560,
    "gpu_memory_utilization": 0.92,
    "enable_prefix_caching": False,
    "block_size": 64,
}
MTP1 = {"num_speculative_tokens": 1, "synthetic_acceptance": 0.9}


@dataclass
class Trace:
    """What a run showed, per step and per request; seconds."""

    steps: list[tuple[float, int]] = field(default_factory=list)  # (duration, tokens brought)
    added: dict[str, float] = field(default_factory=dict)
    arrivals: dict[str, list[float]] = field(default_factory=dict)
    tokens_in: int = 0
    tokens_out: int = 0
    duration: float = 0.0

    def summary(self) -> dict[str, float]:
        ttft = [times[0] - self.added[name] for name, times in self.arrivals.items()]
        gaps = [b - a for times in self.arrivals.values() for a, b in pairwise(times)]
        return {
            "total_tok_s": (self.tokens_in + self.tokens_out) / self.duration,
            "output_tok_s": self.tokens_out / self.duration,
            "ttft_p50_ms": 1e3 * statistics.median(ttft),
            "ttft_p99_ms": 1e3 * percentile(ttft, 99),
            "itl_p50_ms": 1e3 * statistics.median(gaps) if gaps else 0.0,
            "itl_p99_ms": 1e3 * percentile(gaps, 99) if gaps else 0.0,
            "step_p50_ms": 1e3 * statistics.median(d for d, _ in self.steps),
            "duration_s": self.duration,
        }


def percentile(values: list[float], q: float) -> float:
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), q / 100))


def requests(
    count: int, seed: int, inputs: tuple[int, int], outputs: tuple[int, int]
) -> list[AddRequest]:
    rng = random.Random(seed)
    found = []
    for number in range(count):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(*inputs))]
        params = SamplingParams(
            temperature=1.0, max_tokens=rng.randint(*outputs), ignore_eos=True, seed=number
        )
        found.append(AddRequest(f"{seed}-{number}", prompt, params))
    return found


def closed_run(engine: Engine, todo: list[AddRequest], concurrency: int) -> Trace:
    """Keep `concurrency` requests under way until all are done."""
    trace, waiting = Trace(), list(reversed(todo))
    torch.cuda.synchronize()
    start = last = time.perf_counter()

    def add() -> None:
        request = waiting.pop()
        trace.added[request.id] = time.perf_counter()
        trace.tokens_in += len(request.prompt)
        engine.add(request)

    for _ in range(min(concurrency, len(waiting))):
        add()
    while engine.has_work():
        deltas = engine.step()
        now = time.perf_counter()
        if deltas:
            trace.steps.append((now - last, sum(len(d.token_ids) for d in deltas)))
            last = now
        for delta in deltas:
            trace.arrivals.setdefault(delta.id, []).append(now)
            trace.tokens_out += len(delta.token_ids)
            if delta.finish_reason and waiting:
                add()
    trace.duration = time.perf_counter() - start
    return trace


def decode_profile(engine: Engine, rows: int, steps: int = 12) -> dict[str, Any]:
    """Steady decode steps at `rows` rows: wall time a step, GPU time by kernel, idle share."""
    for request in requests(rows, 77, (768, 768), (400, 400)):
        engine.add(request)
    while engine.stats().waiting or engine.stats().running < rows:
        engine.step()
    for _ in range(24):
        engine.step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(2 * steps):
        engine.step()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - start) / (2 * steps)
    found = profiled(engine, steps)
    engine.abort([f"77-{number}" for number in range(rows)])
    while engine.has_work():
        engine.step()
    return {"step_ms": wall * 1e3, **found}


def prefill_profile(engine: Engine, steps: int = 3) -> dict[str, Any]:
    """Full steps of prompt tokens alone: GPU time by kernel."""
    for request in requests(64, 78, (1024, 1024), (1, 1)):
        engine.add(request)
    for _ in range(2):
        engine.step()
    found = profiled(engine, steps)
    while engine.has_work():
        engine.step()
    return found


def profiled(engine: Engine, steps: int) -> dict[str, Any]:
    """Milliseconds a step by kernel (names cut short), their sum, and the GPU's idle share."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        began = time.perf_counter()
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
    kernels: dict[str, float] = {}
    for event in profile.key_averages():
        if event.self_device_time_total > 0:
            name = event.key[:72]
            spent = event.self_device_time_total / steps / 1e3
            kernels[name] = round(kernels.get(name, 0.0) + spent, 3)
    busy = sum(kernels.values())
    top = dict(sorted(kernels.items(), key=lambda item: -item[1])[:24])
    idle = max(0.0, 1.0 - busy * steps / (wall * 1e3))
    return {"busy_ms": busy, "idle_share": idle, "kernels_ms": top}


def ceilings() -> dict[str, float]:
    """What the device does at best: bytes/s of a large copy, FLOP/s of large products."""
    a = torch.randn(1 << 30, dtype=torch.bfloat16, device="cuda")
    b = torch.empty_like(a)
    copy = timed(lambda: b.copy_(a))
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product = timed(lambda: x @ x)
    return {"copy_tb_s": 2 * a.nbytes / copy / 1e12, "bf16_tflop_s": 2 * 8192**3 / product / 1e12}


def timed(run: Any, repeats: int = 10) -> float:
    for _ in range(3):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(repeats):
        run()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / repeats / 1e3


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip()


def measure(options: argparse.Namespace, out: dict[str, Any]) -> None:
    directory = write_config(Path(tempfile.mkdtemp()) / "qwen27b", options.layers)
    for seqs in options.sequences:
        began = time.perf_counter()
        engine = build_engine(
            engine_args(
                model=str(directory),
                max_num_seqs=seqs,
                max_num_batched_tokens=options.chunk,
                speculative_config=MTP1,
                **BASE,
            )
        )
        start = time.perf_counter() - began
        print(f"-- {seqs} sequences: ready after {start:.1f} s", flush=True)
        limits = engine.scheduler.limits
        record: dict[str, Any] = {"start_s": start, "pages": limits.num_pages, "runs": []}
        out["runs"][str(seqs)] = record
        closed_run(engine, requests(64, 1000, (512, 1024), (32, 64)), 64)
        for repeat in range(options.repeats):
            count = 3 * seqs if options.requests is None else options.requests
            todo = requests(count, repeat, (512, 1024), (256, 512))
            record["runs"].append(closed_run(engine, todo, seqs).summary())
            print(json.dumps(record["runs"][-1]), flush=True)
        record["decode"] = decode_profile(engine, seqs)
        print(json.dumps(record["decode"], indent=1), flush=True)
        if options.extras and seqs == options.sequences[0]:
            extras(engine, record)
        engine.close()
        del engine
        torch.cuda.empty_cache()


def extras(engine: Engine, record: dict[str, Any]) -> None:
    """Prefill alone, and few requests at once."""
    record["prefill"] = prefill_profile(engine)
    print(json.dumps(record["prefill"], indent=1), flush=True)
    prefill = closed_run(engine, requests(256, 50, (1024, 1024), (1, 1)), 256)
    record["prefill_tok_s"] = prefill.tokens_in / prefill.duration
    print(f"prefill {record['prefill_tok_s']:.0f} tok/s", flush=True)
    for rows in (1, 8, 32):
        rates = []
        for repeat in range(3):
            run = closed_run(engine, requests(rows, 60 + repeat, (1024, 1024), (256, 256)), rows)
            rates.append(run.summary()["output_tok_s"])
        record[f"batch_{rows}_output_tok_s"] = rates
        print(f"batch {rows}: {[round(r) for r in rates]} output tok/s", flush=True)


def headline(out: dict[str, Any]) -> dict[str, Any]:
    """The figures of the first arrangement that people compare, medians over its repeats."""
    for record in out["runs"].values():
        if record["runs"]:
            return {
                **{
                    name: round(statistics.median(run[name] for run in record["runs"]), 1)
                    for name in ("total_tok_s", "output_tok_s", "itl_p50_ms", "itl_p99_ms")
                },
                "prefill_tok_s": record.get("prefill_tok_s"),
                "decode_step_ms": record.get("decode", {}).get("step_ms"),
                "start_s": record["start_s"],
            }
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h200.json"))
    parser.add_argument("--sequences", type=int, nargs="+", default=[256, 448])
    parser.add_argument("--requests", type=int, help="requests a run (default: 3 x sequences)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--no-extras", dest="extras", action="store_false")
    options = parser.parse_args()
    out: dict[str, Any] = {
        "commit": commit(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ceilings": ceilings(),
        "options": {k: str(v) for k, v in vars(options).items()},
        "runs": {},
    }
    print(out["ceilings"], flush=True)
    try:
        measure(options, out)
    finally:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**headline(out), **out}, indent=1))


if __name__ == "__main__":
    main()
