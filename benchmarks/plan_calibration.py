"""The planner calibrated without a GPU: fitted to a plan log, held against other workloads.

    OMP_NUM_THREADS=1 python benchmarks/plan_calibration.py --out FILE

One engine of millrace-mini in this process, one thread. Its clock is the process's CPU time, so
that other work on the machine changes little. It serves short runs of several concurrencies with a
plan log; the step model is fitted to that log; then workloads that the fit has not seen are
predicted and run, by turns, and their medians taken. Two engines in processes of their own, each
with half of the streams, stand for two replicas: their throughputs are added.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from millrace.config import engine_args
from millrace.engine.engine import Engine
from millrace.plan.calibration.observations import read
from millrace.plan.calibration.refit import Calibration, refit
from millrace.plan.model.posterior import NOISE, interval, posterior, rates
from millrace.plan.model.profiles import with_rates
from millrace.plan.model.step_model import Description
from millrace.plan.predict.load import Load, Settings
from millrace.plan.predict.loops import Replica
from millrace.protocol import AddRequest, SamplingParams
from millrace.replica.build import build_engine

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "millrace-mini"
SEQS, CHUNK, LONGEST = 32, 1024, 1536
# (streams, requests, prompt tokens, output tokens), each range uniform
FITTED = [(1, 4, (32, 400), (16, 48)), (4, 12, (32, 400), (16, 48)), (12, 36, (32, 300), (16, 64)),
          (32, 64, (32, 200), (16, 64))]  # fmt: skip
ROUNDS = 3
UNSEEN = [
    (24, 96, (64, 256), (24, 72)),
    (8, 40, (200, 600), (16, 32)),
    (16, 48, (16, 48), (64, 160)),
]


def build(log: Path | None) -> Engine:
    arguments = engine_args(
        model=str(MODEL), device="cpu", max_num_seqs=SEQS, max_model_len=LONGEST,
        max_num_batched_tokens=CHUNK, enable_prefix_caching=False,
    )  # fmt: skip
    made = build_engine(arguments)
    return Engine(
        made.scheduler, made.worker, plan_log=log, config=made.config, now=time.process_time
    )


def run(engine: Engine, case: tuple[Any, ...], seed: int) -> dict[str, float]:
    """A closed run: tokens a CPU second, and the mean CPU time between a stream's tokens."""
    streams, count, inputs, outputs = case
    rng = random.Random(seed)
    sizes = [(rng.randint(*inputs), rng.randint(*outputs)) for _ in range(count)]
    times: dict[str, list[float]] = {}
    sent = ended = 0
    began = time.process_time()
    while ended < count:
        while sent < count and sent - ended < streams:
            length, most = sizes[sent]
            prompt = [rng.randrange(300, 2000) for _ in range(length)]
            params = SamplingParams(max_tokens=most, ignore_eos=True, temperature=1.0, seed=sent)
            engine.add(AddRequest(f"{seed}-{sent}", prompt, params))
            sent += 1
        for delta in engine.step():
            times.setdefault(delta.id, []).extend([time.process_time()] * len(delta.token_ids))
            ended += delta.finish_reason is not None
    seconds = time.process_time() - began
    gaps = [(t[-1] - t[0]) / (len(t) - 1) for t in times.values() if len(t) > 1]
    return {"tokens": sum(a + b for a, b in sizes) / seconds, "tpot": statistics.fmean(gaps)}


def expected(found: Calibration, case: tuple[Any, ...]) -> dict[str, tuple[float, float, float]]:
    """(value, low, high) of both figures."""
    streams, count, inputs, outputs = case
    load = Load(
        input=statistics.fmean(inputs), output=statistics.fmean(outputs), concurrency=streams,
        requests=count,
    )  # fmt: skip
    settings = Settings(max_num_seqs=SEQS, max_num_batched_tokens=CHUNK, served=False)

    def figures(logarithms: Any) -> Any:
        model = with_rates(found.description, rates(logarithms), posterior())
        replica = Replica(model, load, settings)
        steady = replica.closed(streams)
        seconds = replica.run_seconds(steady, streams)
        return np.array([count * (load.input + load.output) / seconds, steady.tpot])

    noise = np.array([NOISE["total"], NOISE["tpot"]])
    middle, low, high = interval(
        figures, np.array(found.logarithms), np.array(found.covariance), noise
    )
    return {
        name: (float(middle[i]), float(low[i]), float(high[i]))
        for i, name in enumerate(("tokens", "tpot"))
    }


def calibrate() -> Calibration:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "plan.log"
        engine = build(log)
        for seed, case in enumerate([*FITTED, *FITTED]):
            run(engine, case, seed)
        engine.close()
        description = Description(
            gpu="epyc-2", model=str(MODEL), weights="bf16", draft_head="bf16", kv="bf16",
            max_model_len=LONGEST,
        )  # fmt: skip
        return refit(description, read(log))


def two_replicas(case: tuple[Any, ...]) -> float:
    """Tokens a CPU second of two engines, each with half of the streams and of the requests."""
    half = json.dumps([case[0] // 2, case[1] // 2, case[2], case[3]])
    command = [sys.executable, __file__, "--only", half]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [child.communicate(timeout=600)[0] for child in children]
    return sum(json.loads(output.splitlines()[-1])["tokens"] for output in outputs)


def line(name: str, predicted: tuple[float, float, float], measured: float) -> dict[str, Any]:
    value, low, high = predicted
    found = {
        "case": name, "predicted": value, "low": low, "high": high, "measured": measured,
        "error": value / measured - 1, "inside": low <= measured <= high,
    }  # fmt: skip
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="One run, as JSON: streams, requests, inputs, outputs.")
    options = parser.parse_args()
    if options.only:
        engine = build(None)
        run(engine, FITTED[0], 7)
        print(json.dumps(run(engine, tuple(json.loads(options.only)), 99)))
        return
    assert os.environ.get("OMP_NUM_THREADS") == "1", "set OMP_NUM_THREADS=1"
    found = calibrate()
    print(f"{found.observations} steps: median error {found.error:.1%}, {found.before:.1%} before")
    rows = []
    engine = build(None)
    run(engine, FITTED[0], 7)
    runs = [[run(engine, case, 50 + turn) for case in UNSEEN] for turn in range(ROUNDS)]
    for i, case in enumerate(UNSEEN):
        predicted = expected(found, case)
        for name in ("tokens", "tpot"):
            measured = statistics.median(turn[i][name] for turn in runs)
            rows.append(line(f"{case}: {name}", predicted[name], measured))
    engine.close()
    case = (32, 96, (64, 256), (24, 72))
    one = expected(found, (16, 48, *case[2:]))["tokens"]
    twice = (2 * one[0], 2 * one[1], 2 * one[2])
    rows.append(line(f"{case}: tokens of two replicas", twice, two_replicas(case)))
    if options.out:
        options.out.write_text(json.dumps({"fit_error": found.error, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
