"""Predictions that are written down before anything of them was measured: PREDICTIONS.md.

    python benchmarks/plan_predictions.py > benchmarks/PREDICTIONS.md

Everything here is for Millrace on H200s, from the fit that ships. Who measures a row fills in its
last column by hand; a later fit makes a new section and leaves the old one as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from millrace.model.work import StepShape
from millrace.plan.model.posterior import NOISE, interval, posterior, rates
from millrace.plan.model.profiles import with_rates
from millrace.plan.model.step_model import Description
from millrace.plan.predict.load import Load, settings_of
from millrace.plan.predict.prediction import Bar, Deployment, Planner

PLANNER = Planner()
H200 = {"gpu": "h200", "engine": "millrace", "kv": "fp8"}
MOE = H200 | {"model": "qwen3.5-35b-a3b", "weights": "fp8", "draft_head": "fp8"}
DENSE = H200 | {"model": "qwen3.5-27b", "weights": "fp8", "draft_head": "fp8"}
INT4 = H200 | {"model": "qwen3.5-27b", "weights": "int4", "draft_head": "bf16"}
HEADLINE = {"input": 768, "output": 384, "concurrency": 256, "requests": 768,
            "text": "synthetic-0.9"}  # fmt: skip
LONG = {"input": 8192, "output": 1024, "text": "synthetic-0.85"}
BATCH = {"input": 1024, "output": 256, "text": "synthetic-0.9"}


def loop(
    base: dict[str, Any], load: dict[str, Any], drafts: int, replicas: int = 1, **more: Any
) -> dict[str, Bar]:
    length = int(load["input"] * 1.34 + load["output"] * 1.34) + 128
    description = Description(**base, **more, drafts=drafts, max_model_len=max(2560, length))
    settings = settings_of("millrace", served=False, max_num_batched_tokens=16384)
    deployment = Deployment(description, settings, replicas)
    return PLANNER.predict(deployment, Load(**load)).bars


def step(base: dict[str, Any], drafts: int, shape: StepShape, **more: Any) -> Bar:
    """Milliseconds of one step."""
    d = Description(**base, **more, drafts=drafts, max_model_len=2560)
    known = posterior()

    def milliseconds(logarithms: Any) -> float:
        return float(with_rates(d, rates(logarithms), known).seconds(shape)) * 1e3

    found = interval(
        milliseconds, known.logarithms(d.engine, d.gpu), known.covariance(d.engine, d.gpu),
        np.array(NOISE["step"]),
    )  # fmt: skip
    return Bar(*map(float, found))


def decode(base: dict[str, Any], drafts: int, rows: int, **more: Any) -> Bar:
    return step(base, drafts, StepShape.of(rows, 1 + drafts, 900), **more)


def rows() -> Iterator[tuple[str, str, Bar]]:
    """(what, unit, bar)"""
    what = "35B-A3B FP8, 8,192 in / 1,024 out"
    one = loop(MOE, LONG | {"concurrency": 1}, 3)
    yield f"{what}, 1 stream, 3 drafts at 0.85", "tok/s a user", one["tpot"].inverse(1)
    yield "the same", "TTFT ms", one["ttft"].times(1e3)
    yield f"{what}, 16 streams, 3 drafts", "total tok/s", loop(
        MOE, LONG | {"concurrency": 16}, 3)["total_tokens"]  # fmt: skip
    for drafts in (0, 1, 3):
        found = loop(MOE, LONG | {"concurrency": 256}, drafts)
        yield f"{what}, 256 streams, {drafts} drafts", "total tok/s", found["total_tokens"]
    found = loop(MOE, HEADLINE, 1)
    yield "35B-A3B FP8, headline workload, 1 draft at 0.9", "total tok/s", found["total_tokens"]
    yield "the same", "ITL p99 ms", found["itl_p99"].times(1e3)
    yield "the same", "J a token", found["joules"]
    for count in (1, 8, 32, 256):
        yield f"35B-A3B FP8, decode step, {count} rows, 1 draft", "ms", decode(MOE, 1, count)
    prompts = StepShape.of(prompts=16, length=1024)
    yield "35B-A3B FP8, a step of 16 x 1,024 prompt tokens", "ms", step(MOE, 1, prompts)
    what = "27B W4A16"
    for drafts in (0, 1, 3):
        yield f"{what}, decode step, 1 row, {drafts} drafts", "ms", decode(INT4, drafts, 1)
    yield f"{what}, batch 1, 1,024 in / 256 out, 1 draft at 0.9", "output tok/s", loop(
        INT4, BATCH | {"concurrency": 1, "requests": 1}, 1)["output_tokens"]  # fmt: skip
    yield f"{what}, decode step, 256 rows, 1 draft", "ms", decode(INT4, 1, 256)
    found = loop(INT4, HEADLINE, 1)
    yield f"{what}, headline workload, 1 draft", "total tok/s", found["total_tokens"]
    yield "27B FP8, headline workload, two replicas", "total tok/s", loop(
        DENSE, HEADLINE | {"concurrency": 512, "requests": 1536}, 1, replicas=2
    )["total_tokens"]  # fmt: skip
    found = loop(DENSE, HEADLINE, 1, tensor=2)
    yield "27B FP8, headline workload, TP=2, 256 streams", "total tok/s", found["total_tokens"]
    for count in (1, 256):
        yield f"27B FP8, TP=2, decode step, {count} rows", "ms", decode(DENSE, 1, count, tensor=2)
    for count in (1, 256):
        bar = decode(MOE, 1, count, tensor=2)
        yield f"35B-A3B FP8, TP=2 or EP=2, decode step, {count} rows", "ms", bar
    found = loop(MOE, HEADLINE, 1, tensor=2)
    yield "35B-A3B FP8, headline, TP=2, 256 streams", "total tok/s", found["total_tokens"]


HEAD = """# Predictions

Made by `python benchmarks/plan_predictions.py` and committed before anything of them was measured,
so that hits and misses can be counted. Millrace on H200s; decode steps have 900 tokens of context;
the headline workload is 768 requests of 512 to 1,024 tokens in and 256 to 512 out, 256 at once, in
process. Bars are 80% intervals.

## {date}, from {count} measured rows

No row of a mixture of experts in this engine on a GPU is among them: what is said of 35B-A3B rests
on published rows of SGLang and on priors of grouped GEMMs, and supposes kernels as good as those.
W4A16 rests on the priors of 16-bit GEMMs.

| what | unit | predicted | 80% bar | measured |
|---|---|--:|--:|--:|"""


def main() -> None:
    fit = posterior().fit
    print(HEAD.format(date=fit.date, count=len(fit.rows)))
    for what, unit, bar in rows():
        print(f"| {what} | {unit} | {short(bar.value)} | {short(bar.low)} to {short(bar.high)} | |")


def short(value: float) -> str:
    if value >= 1000:
        return f"{round(value, -1):,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


if __name__ == "__main__":
    main()
