"""Where a step's time goes, part by part, and what the parameters behind it rest on."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from millrace.hardware.gpus import gpu as find_gpu
from millrace.model.work import StepShape
from millrace.plan.model.memory import formats_for
from millrace.plan.model.posterior import NAMES, Posterior
from millrace.plan.model.profiles import step_model
from millrace.plan.model.rates import PARAMETERS
from millrace.plan.model.step_model import Description
from millrace.plan.predict.choice import WINDOWS
from millrace.plan.predict.prediction import Planner, Prediction, check


class PartTime(msgspec.Struct, frozen=True):
    """Of one step. flops, bytes: on one rank. bound: compute, memory, or neither."""

    name: str
    seconds: float
    flops: float
    bytes: float
    bound: str


class Rate(msgspec.Struct, frozen=True):
    """A parameter with its relative standard deviation."""

    name: str
    value: float
    deviation: float
    unit: str
    meaning: str
    source: str


class Explanation(msgspec.Struct, frozen=True):
    """seconds: of the step. joules: of all ranks. tokens: through the layers. flops_share,
    bytes_share: of the dense rate of the weights' unit, and of the bandwidth."""

    description: Description
    seconds: float
    joules: float
    tokens: float
    flops_share: float
    bytes_share: float
    parts: list[PartTime]
    rates: list[Rate]
    rests_on: str


def description_of(model: str, given: dict[str, Any]) -> Description:
    """Settings as `settings_options` and `engine_options` give them."""
    name, engine, weights = find_gpu(given["gpu"]).name, given["engine"], given["weights"]
    found = Description(
        gpu=name,
        model=model,
        engine=engine,
        weights=weights,
        draft_head="fp8" if weights == "fp8" and engine == "millrace" else "bf16",
        kv=given["kv"] or formats_for(find_gpu(name), weights).kv,
        state=given["state"],
        window=WINDOWS.get(engine, 0),
        tensor=given["tensor"],
        drafts=given["drafts"],
        max_model_len=given["max_model_len"],
    )
    check(found)
    return found


def explain(model: str, given: dict[str, Any], known: Posterior) -> Explanation:
    """given: options of the command. Raises ConfigError for settings that nothing runs."""
    d = description_of(model, given)
    count = 1.0 if given["prompt_tokens"] else 0.0
    shape = StepShape.of(
        given["rows"], 1 + d.drafts, given["context"], count, given["prompt_tokens"]
    )
    options = {
        name: getattr(d, name)
        for name in Description.__struct_fields__
        if name not in ("gpu", "model", "engine")
    }
    found = step_model(d.gpu, model, d.engine, known, **options)
    work, gpu = found.work(shape), find_gpu(d.gpu)
    seconds = float(found.seconds(shape))
    parts = []
    for name, time in {**found.parts(shape), "host": found.host(shape)}.items():
        part = work.parts.get(name)
        flops, moved = (float(part.flops), float(part.bytes)) if part else (0.0, 0.0)
        bound = "neither"
        if part and (flops or moved):
            slow = flops / gpu.rate(part.unit)
            bound = "compute" if slow > moved / gpu.bytes_per_second else "memory"
        parts.append(PartTime(name, float(time), flops, moved, bound))
    peak = gpu.rate(d.formats.compute) * seconds
    return Explanation(
        description=d,
        seconds=seconds,
        joules=float(found.joules(shape)),
        tokens=float(shape.tokens),
        flops_share=float(work.flops) / peak,
        bytes_share=float(work.bytes) / (gpu.bytes_per_second * seconds),
        parts=parts,
        rates=_rates(found.rates, known, d),
        rests_on=known.source(d.engine, d.gpu),
    )


def _rates(values: dict[str, float], known: Posterior, d: Description) -> list[Rate]:
    deviations = np.sqrt(np.diag(known.covariance(d.engine, d.gpu)))
    return [
        Rate(
            name, values[name], round(float(deviation), 3), PARAMETERS[name].unit,
            PARAMETERS[name].meaning, PARAMETERS[name].source,
        )
        for name, deviation in zip(NAMES, deviations, strict=True)
    ]  # fmt: skip


def print_explanation(found: Explanation) -> None:
    """As tables."""
    from rich.table import Table

    from millrace.plan.text_report import console as wide

    console, d = wide(), found.description
    table = Table(title=f"a step of {found.tokens:g} tokens: {d.model} in {d.weights}, "
                        f"{d.tensor} x {d.gpu}, {d.engine}", title_justify="left")  # fmt: skip
    table.add_column("part")
    for name in ("ms", "share", "GFLOP", "GB"):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for part in sorted(found.parts, key=lambda p: -p.seconds):
        if part.seconds > 0:
            table.add_row(
                part.name, f"{part.seconds * 1e3:.3g}", f"{part.seconds / found.seconds:.0%}",
                f"{part.flops / 1e9:.3g}", f"{part.bytes / 1e9:.3g}", part.bound,
            )  # fmt: skip
    console.print(table)
    console.print(
        f"{found.seconds * 1e3:.4g} ms, {found.joules:.3g} J; {found.flops_share:.0%} of the dense "
        f"rate, {found.bytes_share:.0%} of the bandwidth; rests on: {found.rests_on}"
    )
    rates = Table(title="parameters", title_justify="left")
    for name in ("name", "value", "+-", "unit", "what", "prior from"):
        rates.add_column(name)
    for rate in found.rates:
        rates.add_row(
            rate.name, f"{rate.value:.3g}", f"{rate.deviation:.0%}", rate.unit, rate.meaning,
            rate.source,
        )  # fmt: skip
    console.print(rates)


def decode_parts(planner: Planner, found: Prediction) -> dict[str, float]:
    """Seconds of the decode step of a prediction, by part."""
    d = found.deployment.description
    model = planner.model(d)
    shape = StepShape.of(found.steady.rows, 1 + d.drafts, found.load.context)
    parts = {name: float(value) for name, value in model.parts(shape).items()}
    return {**parts, "host": float(model.host(shape))}
