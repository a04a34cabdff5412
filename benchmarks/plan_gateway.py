"""The planner calibrated on two real CPU replicas behind the gateway, held against other loads.

    OMP_NUM_THREADS=1 python benchmarks/plan_gateway.py [--out FILE]

Two servers of millrace-mini, one thread each, with plan logs; `millrace bench serve` sends loads
to the gateway. The step model is fitted to the plan logs and results of some loads; loads that it
has not seen are predicted and measured. The fitted loads run before, between and behind the others:
what changes between those is the machine, and stands beside the errors; above 10% they say nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from millrace.engine import plan_log
from millrace.fleet.supervisor import FleetOptions, Supervisor
from millrace.gateway.processes.options import GatewayOptions
from millrace.plan.calibration.observations import Observation, from_result, from_timings
from millrace.plan.calibration.refit import Calibration, refit
from millrace.plan.model.posterior import NOISE, interval, posterior, rates
from millrace.plan.model.profiles import with_rates
from millrace.plan.model.step_model import Description
from millrace.plan.predict.load import Load, Settings
from millrace.plan.predict.loops import Replica
from millrace.protocol import StepTiming

MODEL = Path(__file__).resolve().parents[1] / "models" / "millrace-mini"
REPLICAS, SEQS, CHUNK, LONGEST = 2, 16, 1024, 1024
# Each replica has a plan log of its own.
WRAPPER = (
    "import os, sys; os.execv(sys.executable, [sys.executable, '-m', 'millrace.cli', "
    "*sys.argv[2:], '--plan-log', f'{sys.argv[1]}/{os.getpid()}.log'])"
)
SETTINGS = Settings(max_num_seqs=SEQS, max_num_batched_tokens=CHUNK)
DESCRIPTION = Description(
    gpu="epyc-2", model=str(MODEL), weights="bf16", draft_head="bf16", kv="bf16",
    max_model_len=LONGEST,
)  # fmt: skip
# (streams of both replicas, requests, prompt tokens, output tokens)
FITTED = ((4, 16, 150, 24), (12, 60, 100, 48), (24, 80, 180, 32))
UNSEEN = ((20, 80, 220, 30), (8, 48, 60, 64))
STEADY = 0.1  # a machine on which one load's throughput changes by more is no measure
FIGURES = ("total_token_throughput", "mean_tpot_ms")


@dataclass
class Seen:
    """A load that ran: between which moments of the plan logs' clock, and its result."""

    case: tuple[int, ...]
    began: float
    ended: float
    fields: dict[str, Any] = field(default_factory=dict)


async def measured(port: int, case: tuple[int, ...], folder: Path) -> Seen:
    """What `millrace bench serve` measures of a load."""
    streams, count, prompt, output = case
    path, began = folder / f"{time.monotonic_ns()}.json", time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "millrace.cli", "bench", "serve", "--disable-tqdm", "--ignore-eos"),
        *("--base-url", f"http://127.0.0.1:{port}", "--model", "mini", "--seed", "1"),
        *("--num-prompts", str(count), "--max-concurrency", str(streams)),
        *("--random-input-len", str(prompt), "--random-output-len", str(output)),
        *("--random-range-ratio", "0.5", "--result-filename", str(path)),
        stdout=asyncio.subprocess.DEVNULL,
    )
    if await asyncio.wait_for(process.wait(), 240) != 0:
        raise SystemExit("the benchmark failed")
    found = Seen(case, began, time.monotonic(), json.loads(path.read_text()))
    print(case, {name: round(found.fields[name], 1) for name in FIGURES}, flush=True)
    return found


async def run(folder: Path, turns: int) -> tuple[list[list[Seen]], list[list[Seen]]]:
    """The fitted loads, turns + 1 times, and the others between them."""
    serve = ["serve", str(MODEL), "--device", "cpu", "--max-model-len", str(LONGEST)]
    serve += ["--max-num-seqs", str(SEQS), "--max-num-batched-tokens", str(CHUNK)]
    serve += ["--no-enable-prefix-caching", "--served-model-name", "mini"]
    serve += ["--log-level", "warning"]
    serve += ["--speculative-config", '{"num_speculative_tokens": 0}']
    options = FleetOptions(
        command=[sys.executable, "-c", WRAPPER, str(folder), *serve],
        count=REPLICAS,
        port=0,
        device="cpu",
        gateway=GatewayOptions(policy="least_loaded"),
    )
    fleet = Supervisor(options, lambda line: None)
    await fleet.start()
    try:
        port = fleet.gateway.port
        await measured(port, FITTED[1], folder)  # warm
        fitted, unseen = [], []
        for turn in range(turns + 1):
            fitted.append([await measured(port, case, folder) for case in FITTED])
            if turn < turns:
                unseen.append([await measured(port, case, folder) for case in UNSEEN])
        return fitted, unseen
    finally:
        await fleet.stop()


def of_one_replica(fields: dict[str, Any]) -> dict[str, Any]:
    """A result of the fleet as that of one of its replicas, which have equal shares."""
    totals = ("max_concurrency", "completed", "total_input_tokens", "total_output_tokens",
              "total_token_throughput")  # fmt: skip
    return {**fields, **{name: fields[name] / REPLICAS for name in totals}}


def observations(logs: list[Path], runs: list[Seen]) -> list[Observation]:
    """Steps of the plan logs in these runs, and the runs' own figures."""
    found: list[Observation] = []
    for log in logs:
        steps = [e for e in plan_log.read(log) if isinstance(e, StepTiming)]
        inside = [s for s in steps if any(r.began <= s.planned <= r.ended for r in runs)]
        found += from_timings(inside)
    for seen in runs:
        for one in from_result(of_one_replica(seen.fields), "mixed"):
            found.append(Observation(**{**_fields(one), "settings": SETTINGS}))
    return found


def _fields(one: Observation) -> dict[str, Any]:
    return {name: getattr(one, name) for name in Observation.__slots__}


def expected(found: Calibration, seen: Seen) -> list[tuple[float, float, float]]:
    """(value, low, high) of each of FIGURES, of both replicas together."""
    fields = of_one_replica(seen.fields)
    load = Load(
        input=seen.fields["total_input_tokens"] / seen.fields["completed"],
        output=seen.fields["total_output_tokens"] / seen.fields["completed"],
        concurrency=fields["max_concurrency"], requests=fields["completed"],
    )  # fmt: skip

    def figures(logarithms: Any) -> Any:
        model = with_rates(found.description, rates(logarithms), posterior())
        replica = Replica(model, load, SETTINGS)
        steady = replica.closed(load.concurrency)
        seconds = replica.run_seconds(steady, load.concurrency)
        whole = REPLICAS * load.requests * (load.input + load.output)
        return np.array([whole / seconds, steady.tpot * 1e3])

    noise = np.array([NOISE["total"], NOISE["tpot"]])
    bars = interval(figures, np.array(found.logarithms), np.array(found.covariance), noise)
    return [tuple(float(bar[i]) for bar in bars) for i in range(len(FIGURES))]  # type: ignore[misc]


def judge(logs: list[Path], fitted: list[list[Seen]], unseen: list[list[Seen]]) -> dict[str, Any]:
    """Each unseen load of each turn, predicted from the fitted loads on both sides of it."""
    rows = []
    for (before, behind), others in zip(pairwise(fitted), unseen, strict=True):
        found = refit(DESCRIPTION, observations(logs, [*before, *behind]))
        for seen in others:
            for name, (value, low, high) in zip(FIGURES, expected(found, seen), strict=True):
                real = seen.fields[name]
                rows.append({
                    "case": seen.case, "figure": name, "predicted": value, "low": low,
                    "high": high, "measured": real, "error": value / real - 1,
                    "inside": low <= real <= high,
                })  # fmt: skip
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()})
    drift = [
        max(values) / min(values) - 1
        for case in zip(*fitted, strict=True)
        if (values := [seen.fields["total_token_throughput"] for seen in case])
    ]
    return {"rows": rows, "drift": drift}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fitted, unseen = asyncio.run(run(folder, options.turns))
        found = judge(sorted(folder.glob("*.log")), fitted, unseen)
    for case in dict.fromkeys((row["case"], row["figure"]) for row in found["rows"]):
        some = [row for row in found["rows"] if (row["case"], row["figure"]) == case]
        error = statistics.median(row["error"] for row in some)
        print(
            case, f"median error {error:+.1%}, inside {sum(r['inside'] for r in some)}/{len(some)}"
        )
    drift = max(found["drift"])
    print(f"the same load at other times: up to {drift:.0%} apart")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    if drift > STEADY:
        print("nothing is judged: what else ran on this machine changed more than a bar is wide")


if __name__ == "__main__":
    main()
