"""FP8 shapes of published models on one GPU: throughput, latency, and where a step's time goes.

Seeded random weights (none is rounded to zero), synthetic acceptance 0.9 with one draft,
temperature 1, token-id prompts with lengths uniform in [512, 1024], outputs uniform in [256, 512],
end tokens ignored: the workload of the other engines' figures in LEDGER.md.

    python benchmarks/h200_throughput.py --phases default,throughput,bf16_state,warm --repeats 1
    python benchmarks/h200_throughput.py --phases wide,nomtp,long --repeats 1
    python benchmarks/h200_throughput.py --phases start
    python benchmarks/h200_throughput.py --phases floors --model qwen3-8b
    python benchmarks/h200_throughput.py --phases runs,floors --quantization int4
    python benchmarks/h200_throughput.py --phases cookbook_1,cookbook_16 --model qwen3.5-35b-a3b
    python benchmarks/h200_throughput.py --tiny              # every phase, small, on any machine

Each phase is one arrangement (see ARRANGEMENTS). The phases of a call share a process and its
compiled code, and neighbours that differ in the scheduler alone share an engine. Results are merged
into --out after each phase: several calls can share the work, and an interrupted call loses little.
Phases cookbook_N are the workload of SGLang's cookbook: N streams, prompts of 8,192 tokens and
answers of 1,024, with three drafts (synthetic acceptance 0.85: 3.2 tokens a step), or one for 256
streams. Random routers would send tokens to all experts alike, which trained ones do not; so each
row of a router is multiplied by exp(s * normal), with s = `ROUTER_SPREAD`: of 256 experts the
busiest then gets 5 times the mean, and a quarter of them less than 0.3 of it.

The model is Qwen3.5-27B unless --model says otherwise. Minutes on an H200: floors 1, default 2.5 +
1.2 a repeat, throughput 1.2 a repeat, bf16_state 0.7 + 1.2 a repeat, wide 1 + 2 a repeat, nomtp 1 +
1.7 a repeat, long 1.5, start 2, warm 0.5.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine_runs import (
    closed_run,
    commit,
    decode_profile,
    mixed_profile,
    prefill_profile,
    requests,
    synchronize,
)
from model_shapes import (
    QUANTIZATIONS,
    ROUTER_SPREAD,
    SHAPES,
    decode_work,
    floor_seconds,
    prefill_work,
    read_sizes,
    write_config,
)

from millrace.config import engine_args
from millrace.engine.engine import Engine
from millrace.engine.scheduler import Scheduler
from millrace.model.layers.moe import MoE
from millrace.model.tiny import QWEN3, QWEN3_MOE, TinyShape, config_json, moe_config_json
from millrace.replica.build import build_engine

ROOT = Path(__file__).resolve().parents[1]
BASE: dict[str, Any] = {
    "load_format": "dummy",
    "kv_cache_dtype": "fp8_e4m3",
    "max_model_len": 2560,
    "max_num_batched_tokens": 16384,
    "gpu_memory_utilization": 0.92,
    "enable_prefix_caching": False,
    "block_size": 64,
    "speculative_config": {"num_speculative_tokens": 1, "synthetic_acceptance": 0.9},
}
# What each phase's engine has otherwise than BASE.
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "default": {"max_num_seqs": 256},
    "runs": {"max_num_seqs": 256},
    "sampled": {"max_num_seqs": 256},
    "throughput": {"max_num_seqs": 256},
    "bf16_state": {"max_num_seqs": 256, "mamba_ssm_cache_dtype": "bfloat16"},
    "fp16_state": {"max_num_seqs": 256, "mamba_ssm_cache_dtype": "float16"},
    "wide": {"max_num_seqs": 448},
    "nomtp": {"max_num_seqs": 256, "speculative_config": None},
    "long": {"max_num_seqs": 16, "max_model_len": 33280},
    "floors": {"max_num_seqs": 256},
    "overload": {"max_num_seqs": 64},
    **{
        f"cookbook_{streams}": {
            "max_num_seqs": streams,
            "max_model_len": 9472,
            "speculative_config": {
                "num_speculative_tokens": drafts,
                "synthetic_acceptance": acceptance,
            },
        }
        for streams, drafts, acceptance in ((1, 3, 0.85), (16, 3, 0.85), (256, 1, 0.9))
    },
}
# And what its scheduler has otherwise than the engine was built with.
LIMITS: dict[str, dict[str, Any]] = {"throughput": {"mixed_prefill_tokens": 16384}}
# What requests of a phase ask for beside temperature 1: "sampled" takes Qwen's generation_config.
SAMPLING: dict[str, dict[str, Any]] = {"sampled": {"top_k": 20, "top_p": 0.95}}
STARTS = ("start", "warm")


@dataclass(frozen=True)
class Scale:
    """How large everything is. lengths: of prompts and outputs, [low, high]."""

    inputs: tuple[int, int] = (512, 1024)
    outputs: tuple[int, int] = (256, 512)
    warmup: int = 64
    batches: tuple[int, ...] = (1, 8, 32)
    long: int = 32768
    cookbook: tuple[int, int] = (8192, 1024)
    profiled: int = 12
    vocab: int = 248_000


TINY = Scale((16, 32), (8, 16), 4, (1, 2), 512, (64, 16), 2, 2000)
TINY_ARGS: dict[str, Any] = {
    "kv_cache_dtype": "auto",
    "max_model_len": 640,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 1 << 28,
    "block_size": 16,
}


# --- ceilings ----------------------------------------------------------------------------------


def ceilings(size: int) -> dict[str, float]:
    """What the device does at best: bytes/s of a large copy, FLOP/s of bf16 and FP8 products."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(size**2 * 16, dtype=torch.bfloat16, device=device)
    b = torch.empty_like(a)
    x = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    found = {
        "copy_tb_s": 2 * a.nbytes / timed(lambda: b.copy_(a)) / 1e12,
        "bf16_tflop_s": 2 * size**3 / timed(lambda: x @ x) / 1e12,
    }
    if device == "cuda":
        from millrace.kernels.gpu.gemm.fp8 import fp8_matmul
        from millrace.kernels.gpu.quantize import quantize

        q, scale = quantize(x), torch.rand(size // 128, size // 128, device=device) + 0.5
        weight = x.to(torch.float8_e4m3fn)
        product = timed(lambda: fp8_matmul(q, weight, scale, torch.bfloat16))
        found["fp8_tflop_s"] = 2 * size**3 / product / 1e12
    return found


def timed(run: Callable[[], object], repeats: int = 10) -> float:
    """Mean seconds of a call."""
    for _ in range(3):
        run()
    synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return (time.perf_counter() - began) / repeats


def achieved(record: dict[str, Any], sizes: Any, context: float, drafts: int) -> dict[str, Any]:
    """FLOP/s and bytes/s of the profiled decode step, by what the step must compute and move."""
    decode = record["decode"]
    work = decode_work(sizes, decode["rows"], 1 + drafts, context)
    seconds = decode["step_ms"] / 1e3
    return {
        "tflop_s": work.flops / seconds / 1e12,
        "tb_s": work.bytes / seconds / 1e12,
        "floor_ms": {name: 1e3 * value for name, value in floor_seconds(work).items()},
    }


# --- phases ------------------------------------------------------------------------------------


def arguments_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The engine's arguments in phase `name`."""
    found = {**BASE, **ARRANGEMENTS[name], **(TINY_ARGS if options.tiny else {})}
    if not SHAPES[options.model].get("mtp_num_hidden_layers"):
        found["speculative_config"] = None
    elif options.quantization != "fp8" and found["speculative_config"] is not None:
        found["speculative_config"] = {**found["speculative_config"], "quantization": "fp8"}
    return found


class Engines:
    """One engine at a time, kept while phases ask for the same."""

    def __init__(self, options: argparse.Namespace, model: Path) -> None:
        self._options, self._model = options, model
        self._engine: Engine | None = None
        self._limits: Any = None
        self._built: dict[str, Any] = {}

    def of(self, name: str, record: dict[str, Any]) -> Engine:
        """An idle engine as phase `name` wants it."""
        arguments = arguments_of(name, self._options)
        if self._engine is None or arguments != self._built:
            self.close()
            began, first = time.perf_counter(), not self._built
            self._engine = build_engine(engine_args(model=str(self._model), **arguments))
            spread_routers(self._engine.worker.model)
            self._limits, self._built = self._engine.scheduler.limits, arguments
            record["start_s"] = time.perf_counter() - began
            if first:  # with the process's imports and no phase before it
                record["since_process_start_s"] = time.time() - psutil.Process().create_time()
            print(f"-- {name}: ready after {record['start_s']:.1f} s", flush=True)
        limits = msgspec.structs.replace(self._limits, **LIMITS.get(name, {}))
        self._engine.scheduler = Scheduler(limits)
        record |= {"pages": limits.num_pages, "mixed_prefill_tokens": limits.mixed_prefill_tokens}
        record["arguments"] = {k: str(v) for k, v in arguments.items()}
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def spread_routers(model: Any) -> None:
    """Have some experts liked better than others (see above). Graphs read the same memory."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, MoE):
            weight = module.router.weight.data[: module.count]
            factors = torch.randn(len(weight), generator=generator).mul(ROUTER_SPREAD).exp()
            weight.mul_(factors[:, None].to(weight))


def phase(
    name: str, engine: Engine, options: argparse.Namespace, model: Path, record: dict[str, Any]
) -> None:
    """Fill `record` with what the phase shows; it is written after each part."""
    scale: Scale = options.scale
    if name == "long":
        long_context(engine, scale, record)
        return
    rows = engine.scheduler.limits.max_num_seqs
    if name.startswith("cookbook_"):
        cookbook(engine, rows, scale, record, read_sizes(model))
        return
    sampling = SAMPLING.get(name, {})
    warmup = requests(scale.warmup, 1000, scale.inputs, (32, 64), scale.vocab, **sampling)
    closed_run(engine, warmup, scale.warmup)
    if name == "overload":
        overload(engine, rows, scale, record)
        return
    if name == "floors":
        floors(engine, rows, scale, record, read_sizes(model))
        return
    throughput(engine, rows, options, record, sampling)
    if name in ("runs", "sampled"):
        few_requests(engine, scale, record, sampling)
    if name in ("throughput", "runs", "sampled"):
        return
    if name == "default":
        few_requests(engine, scale, record, sampling)
        prefill_alone(engine, rows, scale, record)
        options.write()
    drafts = engine.scheduler.limits.drafts
    profile(engine, rows, drafts, scale, record, read_sizes(model))
    if name == "default":
        decoding, prompt = rows - rows // 32 - 1, scale.inputs[1]
        record["mixed"] = mixed_profile(engine, decoding, scale.vocab, prompt, 6)
        print(json.dumps({"mixed": record["mixed"]}, indent=1), flush=True)


def throughput(
    engine: Engine,
    rows: int,
    options: argparse.Namespace,
    record: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Closed runs of three waves of requests."""
    scale, runs = options.scale, record.setdefault("runs", [])
    for repeat in range(options.repeats):
        lengths = scale.inputs, scale.outputs
        todo = requests(3 * rows, repeat, *lengths, scale.vocab, **sampling)
        runs.append(closed_run(engine, todo, rows).summary())
        print(json.dumps(runs[-1]), flush=True)
        options.write()


def overload(engine: Engine, rows: int, scale: Scale, record: dict[str, Any]) -> None:
    """As many requests at a time as there are slots, and eight times as many, by turns: short ones,
    ten for each slot. The ratio is of the rates while every slot is taken."""
    shorter = tuple((low // 4, high // 4) for low, high in (scale.inputs, scale.outputs))
    found: dict[int, list[float]] = {1: [], 8: []}
    for repeat in range(2):
        for times, rates in found.items():
            todo = requests(10 * rows, repeat, *shorter, scale.vocab)
            full = closed_run(engine, todo, times * rows).while_full(rows)
            rates.append(full["total_tok_s"])
            record.setdefault("offered", []).append({"requests": times * rows, **full})
            print(f"{times * rows} offered: {rates[-1]:.0f} tok/s", flush=True)
    record["ratio"] = statistics.median(found[8]) / statistics.median(found[1])
    print(f"ratio {record['ratio']:.3f}", flush=True)


def profile(
    engine: Engine, rows: int, drafts: int, scale: Scale, record: dict[str, Any], sizes: Any
) -> None:
    length = sum(scale.inputs) // 2
    decode = decode_profile(engine, rows, scale.vocab, length, scale.profiled)
    record["decode"] = decode
    context = length + 4 * scale.profiled + 24
    record["achieved"] = achieved(record, sizes, context, drafts)
    print(json.dumps({"decode": decode, "achieved": record["achieved"]}, indent=1), flush=True)


def floors(engine: Engine, rows: int, scale: Scale, record: dict[str, Any], sizes: Any) -> None:
    """Decode steps and prompts against what the device can do at best; no run of requests."""
    profile(engine, rows, engine.scheduler.limits.drafts, scale, record, sizes)
    prefill_alone(engine, rows, scale, record)
    length = scale.inputs[1]
    prompts = max(1, engine.scheduler.limits.max_num_batched_tokens // length)  # of a step
    work = prefill_work(sizes, prompts, length)
    rate = record["prefill_tok_s"] / length / prompts  # steps a second
    record["prefill_achieved"] = {
        "tflop_s": work.flops * rate / 1e12,
        "share_of_floor": floor_seconds(work)["all"] * rate,
        "floor_tok_s": prompts * length / floor_seconds(work)["all"],
    }
    floor = record["achieved"]["floor_ms"]["all"]
    record["decode_share_of_floor"] = floor / record["decode"]["step_ms"]
    found = {name: record[name] for name in ("prefill_achieved", "decode_share_of_floor")}
    print(json.dumps(found, indent=1), flush=True)


def cookbook(engine: Engine, rows: int, scale: Scale, record: dict[str, Any], sizes: Any) -> None:
    """A wave of requests of equal lengths, more where they are few; then the decode step alone."""
    length, outputs = scale.cookbook
    warmup = requests(min(rows, 4), 1000, (length, length), (32, 32), scale.vocab)
    closed_run(engine, warmup, rows)
    count = rows if rows > 16 else 2 * rows
    todo = requests(count, 95, (length, length), (outputs, outputs), scale.vocab)
    trace = closed_run(engine, todo, rows)
    found = {k: v for k, v in trace.summary().items() if not isinstance(v, dict | None)}
    tpot = [
        (arrivals[-1][0] - arrivals[0][0]) / (sum(count for _, count in arrivals) - 1)
        for arrivals in trace.arrivals.values()
    ]
    found |= {"tpot_ms": 1e3 * statistics.median(tpot), "user_tok_s": 1 / statistics.median(tpot)}
    record["cookbook"] = found
    print(json.dumps({k: round(v, 2) for k, v in found.items()}), flush=True)
    drafts = engine.scheduler.limits.drafts
    profile(engine, min(rows, 64), drafts, scale, record, sizes)


def prefill_alone(engine: Engine, rows: int, scale: Scale, record: dict[str, Any]) -> None:
    length = scale.inputs[1]
    record["prefill"] = prefill_profile(engine, rows // 2, length, scale.vocab, 3)
    trace = closed_run(engine, requests(rows, 50, (length, length), (1, 1), scale.vocab), rows)
    record["prefill_tok_s"] = sum(trace.prompts.values()) / (trace.end - trace.start)
    print(json.dumps(record["prefill"], indent=1), flush=True)
    print(f"prefill {record['prefill_tok_s']:.0f} tok/s", flush=True)


def few_requests(
    engine: Engine, scale: Scale, record: dict[str, Any], sampling: dict[str, Any]
) -> None:
    """Output tok/s of a few requests at once, three times each."""
    for rows in scale.batches:
        rates = []
        for repeat in range(3):
            shape = ((scale.inputs[1],) * 2, (scale.outputs[0],) * 2)
            todo = requests(rows, 60 + repeat, *shape, scale.vocab, **sampling)
            rates.append(closed_run(engine, todo, rows).summary()["output_tok_s"])
        record[f"batch_{rows}_output_tok_s"] = rates
        print(f"batch {rows}: {[round(rate) for rate in rates]} output tok/s", flush=True)


def long_context(engine: Engine, scale: Scale, record: dict[str, Any]) -> None:
    """One long prompt alone, then several at once: time to the first token, speed after it."""
    for rows in (1, 4):
        todo = requests(rows, 90 + rows, (scale.long,) * 2, (64, 64), scale.vocab)
        found = closed_run(engine, todo, rows).summary()
        record[f"{rows} x {scale.long}"] = found
        print(json.dumps(found), flush=True)


def start_up(name: str, options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Seconds until an engine is ready, in new processes. "start": nothing compiled yet, then all
    of it; "warm": only the latter, with what this machine has compiled."""
    command = [sys.executable, __file__, "--phases", "ready", "--model", options.model]
    command += ["--quantization", options.quantization]
    command += ["--layers", str(options.layers)] if options.layers else []
    command += ["--tiny"] if options.tiny else []
    with tempfile.TemporaryDirectory() as caches:
        names = ("TRITON_CACHE_DIR", "DG_JIT_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        names += ("XDG_CACHE_HOME", "CUDA_CACHE_PATH")
        fresh = {key: str(Path(caches, key)) for key in names} if name == "start" else {}
        for figure in ("cold_s", "warm_s") if name == "start" else ("warm_s",):
            began = time.perf_counter()
            done = subprocess.run(command, env=os.environ | fresh, capture_output=True, text=True)
            record[figure] = time.perf_counter() - began
            if done.returncode:
                raise SystemExit(f"no engine came up:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
            record[f"{figure[:-2]}_engine_s"] = float(done.stdout.split()[-1])
            print(f"start {figure}: {record[figure]:.1f} ({done.stdout.split()[-1]} s of engine)")
            parts = [line for line in done.stderr.splitlines() if re.search(r"[0-9] s\b", line)]
            print("\n".join(f"    {line}" for line in parts), flush=True)
            options.write()


def ready(options: argparse.Namespace, model: Path) -> None:
    """What `start_up` runs: an engine that has completed a real step, and its time."""
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)6.0f ms %(message)s")
    began = time.perf_counter()
    arguments = arguments_of("default", options)
    build_engine(engine_args(model=str(model), **arguments)).close()
    print(f"{time.perf_counter() - began:.1f}")


# --- results -----------------------------------------------------------------------------------


def headline(phases: dict[str, Any]) -> dict[str, Any]:
    """The figures that people compare, medians over repeats."""
    found: dict[str, Any] = {}
    default = phases.get("default", {})
    start = {**phases.get("warm", {}), **phases.get("start", {})}
    runs = default.get("runs", [])
    for name in ("total_tok_s", "output_tok_s", "itl_p50_ms", "itl_p99_ms"):
        if runs:
            found[name] = round(statistics.median(run[name] for run in runs), 1)
    steady = [run["steady"]["total_tok_s"] for run in runs if run["steady"]]
    if steady:
        found["steady_total_tok_s"] = round(statistics.median(steady), 1)
    found |= {k: v for k, v in default.items() if k.startswith(("batch_", "prefill_tok"))}
    if "decode" in default:
        found["decode_step_ms"] = default["decode"]["step_ms"]
        found["decode_idle_share"] = default["decode"]["idle_share"]
    found |= {f"start_{name}": start[name] for name in ("cold_s", "warm_s") if name in start}
    if "cold_s" not in start and "since_process_start_s" in default:
        found["start_cold_s"] = default["since_process_start_s"]  # on a machine that was bare
    return found


def with_headline(out: dict[str, Any]) -> dict[str, Any]:
    """The headline first, in place of what an earlier call had there."""
    found = headline(out["phases"])
    return {**found, **{key: value for key, value in out.items() if key not in found}}


def table(phases: dict[str, Any]) -> str:
    """One line a phase, as Markdown."""
    lines = [
        "| phase | total tok/s | min..max | steady | output tok/s | ITL p50 / p99 ms | decode ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, record in phases.items():
        runs = record.get("runs")
        if not runs:
            continue
        median = {
            k: statistics.median(run[k] for run in runs)
            for k in ("total_tok_s", "output_tok_s", "itl_p50_ms", "itl_p99_ms")
        }
        totals = [run["total_tok_s"] for run in runs]
        steady = [run["steady"]["total_tok_s"] for run in runs if run["steady"]]
        lines.append(
            f"| {name} | {median['total_tok_s']:,.0f} | {min(totals):,.0f}..{max(totals):,.0f} "
            f"| {statistics.median(steady) if steady else 0:,.0f} "
            f"| {median['output_tok_s']:,.0f} "
            f"| {median['itl_p50_ms']:.0f} / {median['itl_p99_ms']:.0f} "
            f"| {record.get('decode', {}).get('step_ms', 0):.1f} |"
        )
    return "\n".join(lines)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    usual = [name for name in ARRANGEMENTS if name != "floors" and "cookbook" not in name]
    parser.add_argument("--phases", default=",".join([*usual, "start"]))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", choices=SHAPES, default="qwen3.5-27b")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="fp8")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few tokens")
    options = parser.parse_args()
    options.phases = options.phases.split(",")
    known = {*ARRANGEMENTS, *STARTS, "ready"}
    if unknown := [name for name in options.phases if name not in known]:
        parser.error(f"--phases: no {unknown[0]!r}; there are {', '.join(sorted(known))}")
    vocab = min(Scale().vocab, SHAPES[options.model]["vocab_size"])
    options.scale = TINY if options.tiny else dataclasses.replace(Scale(), vocab=vocab)
    options.out = options.out or (
        Path(tempfile.gettempdir(), "h200_tiny.json")
        if options.tiny
        else ROOT / "benchmarks" / "results" / f"h200{_suffix(options)}.json"
    )
    return options


def _suffix(options: argparse.Namespace) -> str:
    model, form = options.model, options.quantization
    return ("" if model == "qwen3.5-27b" else f"_{model}") + ("" if form == "fp8" else f"_{form}")


def model_directory(options: argparse.Namespace, parent: Path) -> Path:
    if not options.tiny:
        name = options.model
        return write_config(parent / name, options.layers, name, options.quantization)
    small = {
        "qwen3.5-27b": config_json(TinyShape()),
        "qwen3.5-35b-a3b": moe_config_json(TinyShape()),
        "qwen3-coder-30b-a3b": {**QWEN3_MOE, "vocab_size": TINY.vocab},
    }.get(options.model, {**QWEN3, "vocab_size": TINY.vocab})
    if options.quantization != "fp8":
        small["quantization_config"] = QUANTIZATIONS[options.quantization]
    parent.joinpath("config.json").write_text(json.dumps(small))
    return parent


def main() -> None:
    options = parse_options()
    logging.basicConfig(format="%(name)s %(message)s")
    logging.getLogger("millrace").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as parent:
        model = model_directory(options, Path(parent))
        if options.phases == ["ready"]:
            ready(options, model)
            return
        out = json.loads(options.out.read_text()) if options.out.exists() else {}
        out.setdefault("phases", {})

        def write() -> None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(with_headline(out), indent=1) + "\n")

        options.write = write
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        same = {"commit": commit(), "device": device, "torch": torch.__version__}
        same["ceilings"] = ceilings(256 if options.tiny else 8192)
        print(same, flush=True)
        engines = Engines(options, model)
        for name in options.phases:
            record: dict[str, Any] = dict(same)
            out["phases"][name] = record
            if name in STARTS:
                engines.close()
                start_up(name, options, record)
            else:
                phase(name, engines.of(name, record), options, model, record)
            write()
        engines.close()
        print(table(out["phases"]))
        print(f"written to {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
