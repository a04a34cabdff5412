"""Time to first token of short prompts that arrive while a long one is computed, in process.

Qwen3.5-27B-FP8 shapes on one GPU. A prompt of `--long` tokens is computed, and meanwhile a prompt
of `--short` tokens arrives every 0.3 s or so, at any moment of a step. Thresholds of long prompts
take turns, each with and without a step launched behind a large piece of a long prompt.

    python benchmarks/short_beside_long_h200.py --thresholds 2048,1024,512 --rounds 2
    python benchmarks/short_beside_long_h200.py --tiny      # small, on any machine
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine_runs import commit
from h200_throughput import BASE, TINY_ARGS
from model_shapes import write_config

from millrace.config import engine_args
from millrace.engine import engine as loop
from millrace.engine.engine import Engine
from millrace.engine.scheduler import Scheduler
from millrace.model.tiny import TinyShape, config_json
from millrace.protocol import AddRequest, SamplingParams
from millrace.replica.build import build_engine

NEVER = 1 << 30  # tokens of a large piece, so that there is none


@dataclass
class Found:
    """Milliseconds to first tokens: of short prompts, and of the long one beside them."""

    short: list[float] = field(default_factory=list)
    long: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        ordered = sorted(self.short)
        return {
            "short_p50_ms": statistics.median(ordered),
            "short_p90_ms": ordered[int(0.9 * (len(ordered) - 1))],
            "short_most_ms": ordered[-1],
            "shorts": len(ordered),
            "long_ms": statistics.median(self.long),
        }


def run_long(engine: Engine, rng: random.Random, options: argparse.Namespace) -> Found:
    """One long prompt to its first token, with short ones beside it."""
    arrivals: dict[str, float] = {}
    found, shorts, began = Found(), 0, time.perf_counter()
    next_short = began + rng.uniform(0.5, 1.5) * options.every

    def add(name: str, tokens: int, arrival: float) -> None:
        prompt = [rng.randrange(3, 2000) for _ in range(tokens)]
        params = SamplingParams(max_tokens=1, temperature=1.0, seed=1, ignore_eos=True)
        engine.add(AddRequest(name, prompt, params))
        arrivals[name] = arrival

    add("long", options.long, began)
    while engine.has_work():
        now = time.perf_counter()
        while "long" in arrivals and next_short <= now:  # it arrived while a step was awaited
            add(f"short {shorts}", options.short, next_short)
            shorts += 1
            next_short += rng.uniform(0.5, 1.5) * options.every
        for delta in engine.step():
            took = 1e3 * (time.perf_counter() - arrivals.pop(delta.id))
            (found.long if delta.id == "long" else found.short).append(took)
    return found


def measure(engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    limits, large = engine.scheduler.limits, loop.LARGE_PIECE
    found: dict[str, Found] = {}
    rng = random.Random(1)
    run_long(engine, rng, options)  # what a first time costs
    for _ in range(options.rounds):
        for threshold in options.thresholds:
            for ahead in (False, True):
                changed = msgspec.structs.replace(limits, long_prefill_token_threshold=threshold)
                engine.scheduler = Scheduler(changed)
                loop.LARGE_PIECE = NEVER if ahead else large
                one = run_long(engine, rng, options)
                kept = found.setdefault(f"{threshold}{', ahead' if ahead else ''}", Found())
                kept.short += one.short
                kept.long += one.long
    loop.LARGE_PIECE = large
    return {name: one.summary() for name, one in found.items() if one.short}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", type=int, default=32768)
    parser.add_argument("--short", type=int, default=64)
    parser.add_argument("--every", type=float, default=0.3, help="seconds between short prompts")
    parser.add_argument("--thresholds", default="2048,1024,512")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.thresholds = [int(part) for part in options.thresholds.split(",")]
    arguments: dict[str, Any] = {**BASE, "max_num_seqs": 16, "max_model_len": 33280}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent)
        if options.tiny:
            options.long, options.every, options.short = 560, 0.3, 8
            arguments |= {**TINY_ARGS, "max_model_len": 640, "async_scheduling": True}
            (directory / "config.json").write_text(json.dumps(config_json(TinyShape(fp8=True))))
        else:
            write_config(directory, options.layers)
        engine = build_engine(engine_args(model=str(directory), **arguments))
        print(f"ready after {time.perf_counter() - began:.1f} s", flush=True)
        found = measure(engine, options)
        engine.close()
    for name, one in found.items():
        line = {key: round(value, 1) for key, value in one.items()}
        print(f"{name:14} {json.dumps(line)}", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"commit": commit(), "by_threshold": found}, indent=1))


if __name__ == "__main__":
    main()
