"""Steps with prompts in them, alone and beside decoding rows: host time, wall time, joules.

Qwen3.5-27B-FP8 shapes on one GPU. Plans are written by hand and handed to the worker, so that a
step is always the same: `--rows` sequences of 768 tokens decode with one draft (accepted at 0.9),
and one prompt of so many tokens is computed beside them, or alone. Plans are launched one ahead of
the result that is read, as an engine does.

    python benchmarks/mixed_step.py --seconds 2 --out mixed.json
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from energy import Energy
from engine_runs import commit
from h200_throughput import BASE, TINY_ARGS
from model_shapes import write_config

from millrace.config import engine_args
from millrace.model.tiny import TinyShape, config_json
from millrace.protocol import Admission, Chunk, PageGrant, StepPlan
from millrace.replica.build import build_engine

PROMPT = 768  # tokens of a decoding row's prompt
CACHED = 8192  # tokens before the short prompt that continues a cached one


class Bench:
    """An engine's worker, its pages handed out by slot, and plans for it."""

    def __init__(self, options: argparse.Namespace, model: Path) -> None:
        arguments = {**BASE, "max_num_seqs": options.seqs, **(TINY_ARGS if options.tiny else {})}
        arguments["max_model_len"] = 640 if options.tiny else 8704
        began = time.perf_counter()
        self.engine = build_engine(engine_args(model=str(model), **arguments))
        self.start_s = time.perf_counter() - began
        self.worker: Any = self.engine.worker
        limits = self.worker.limits()
        self.limits, self.page = limits, limits.page_size
        self.free = iter(range(1, limits.num_pages))
        self.pages: dict[int, list[int]] = {}
        self.step = 10_000
        self.prompt = 48 if options.tiny else PROMPT
        self.cached = 256 if options.tiny else CACHED
        self.energy = Energy()

    def admission(self, slot: int, tokens: int, most: int, top_k: int, top_p: float) -> Admission:
        return Admission(
            slot=slot, tokens=[(7 * slot + i) % 2000 for i in range(tokens)], start=0, snapshot=-1,
            max_total=most, temperature=1.0, top_p=top_p, top_k=top_k, seed=slot,
            stop_token_ids=[],
        )  # fmt: skip

    def plan(self, **given: Any) -> StepPlan:
        self.step += 1
        empty: dict[str, Any] = {
            "admissions": [], "grants": [], "decode": [], "chunks": [], "saves": [],
        }  # fmt: skip
        return StepPlan(step=self.step, **{**empty, "context": self.limits.max_model_len, **given})

    def grant(self, slot: int, tokens: int) -> PageGrant:
        """Pages for a slot's first tokens; the same ones each time."""
        pages = self.pages.setdefault(slot, [])
        while len(pages) * self.page < tokens:
            pages.append(next(self.free))
        return PageGrant(slot, 0, list(pages))

    def fill(self, slots: list[int], tokens: int, most: int, top_k: int, top_p: float) -> None:
        """Prefill slots with prompts of so many tokens; they may decode afterwards."""
        at_once = max(1, self.limits.max_num_batched_tokens // tokens)
        for first in range(0, len(slots), at_once):
            some = slots[first : first + at_once]
            self.worker.launch(
                self.plan(
                    admissions=[self.admission(s, tokens, most, top_k, top_p) for s in some],
                    grants=[self.grant(s, most) for s in some],
                    chunks=[Chunk(s, 0, tokens, last=True) for s in some],
                )
            ).result()

    def measure(self, make: Callable[[], StepPlan], seconds: float, most: int) -> dict[str, float]:
        """Host and wall milliseconds and joules of a step, over `seconds` or `most` steps."""
        pending = None
        for _ in range(3):
            pending, last = self.worker.launch(make()), pending
            if last is not None:
                last.result()
        assert pending is not None
        pending.result()
        host = []
        before, began, steps = self.energy.joules(), time.perf_counter(), 0
        while steps < most and (time.perf_counter() - began < seconds or steps < 5):
            plan = make()
            start = time.perf_counter()
            launched = self.worker.launch(plan)
            host.append(time.perf_counter() - start)
            if steps:
                pending.result()
            pending, steps = launched, steps + 1
        pending.result()
        wall = time.perf_counter() - began
        used = self.energy.joules() - before
        return {
            "host_ms": 1e3 * statistics.median(host),
            "wall_ms": 1e3 * wall / steps,
            "joules": used / steps,
            "steps": steps,
        }


def lone(bench: Bench, slot: int, tokens: int) -> Callable[[], StepPlan]:
    """A prompt that is new in each step."""
    grant = bench.grant(slot, tokens + 8)

    def make() -> StepPlan:
        return bench.plan(
            admissions=[bench.admission(slot, tokens, tokens + 1, 0, 1.0)],
            grants=[grant],
            chunks=[Chunk(slot, 0, tokens, last=True)],
        )

    return make


def beside(bench: Bench, rows: list[int], slot: int, tokens: int) -> Callable[[], StepPlan]:
    """The same beside decoding rows."""
    alone = lone(bench, slot, tokens) if tokens else bench.plan

    def make() -> StepPlan:
        plan = alone()
        return bench.plan(
            admissions=plan.admissions, grants=plan.grants, chunks=plan.chunks, decode=rows
        )

    return make


def behind(bench: Bench, slot: int, tokens: int) -> Callable[[], StepPlan]:
    """A few tokens behind a long context, over and over."""

    def make() -> StepPlan:
        return bench.plan(chunks=[Chunk(slot, bench.cached, tokens, last=True)])

    return make


def steps(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def note(name: str, make: Callable[[], StepPlan], most: int = 10_000) -> None:
        found[name] = bench.measure(make, options.seconds, most)
        line = {key: round(value, 2) for key, value in found[name].items()}
        print(f"{name:28} {json.dumps(line)}", flush=True)

    counts = [16, 64] if options.tiny else [64, 512, 1024, 2048]
    mixed = [0, 16, 64] if options.tiny else [0, 64, 512, 1450]
    slot = bench.limits.max_num_seqs
    for tokens in counts:
        note(f"alone {tokens}", lone(bench, slot, tokens))
    long = slot - 1
    bench.fill([long], bench.cached, bench.cached + 300, 0, 1.0)
    note("64 behind a long context", behind(bench, long, 64))
    rows = list(range(1, min(options.rows, slot - 2) + 1))
    most = 500 if options.tiny else bench.prompt + 1100
    for filters in (False, True):
        kind = ", top_k 20, top_p 0.95" if filters else ""
        some = mixed[:3:2] if filters else mixed
        bench.fill(rows, bench.prompt, most, *((20, 0.95) if filters else (0, 1.0)))
        room = (most - bench.prompt) // (2 * len(some)) - 8  # steps until rows end
        for tokens in some:
            note(f"{len(rows)} rows beside {tokens}{kind}", beside(bench, rows, slot, tokens), room)
    for few in (1, 8, 32):
        bench.fill(rows[:few], bench.prompt, most, 0, 1.0)
        note(f"{few} rows beside 64", beside(bench, rows[:few], slot, 64), 200)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=226)
    parser.add_argument("--seqs", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--tiny", action="store_true", help="small, on any machine")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent)
        if options.tiny:
            options.rows, options.seqs = 2, 4
            (directory / "config.json").write_text(json.dumps(config_json(TinyShape(fp8=True))))
        else:
            write_config(directory, options.layers)
        bench = Bench(options, directory)
        print(f"ready after {bench.start_s:.1f} s, {bench.limits.num_pages} pages", flush=True)
        found = {"start_s": bench.start_s, "steps": steps(bench, options)}
        bench.engine.close()
    found["commit"] = commit()
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
