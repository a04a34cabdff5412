"""What a deployment does: figures with 80% bars, what they rest on, memory, energy.

Bars join what is not known of the step model's parameters, of the text (how often drafts are
accepted), of the memory that is left, and what the model leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from millrace.errors import ConfigError
from millrace.hardware.gpus import gpu as find_gpu
from millrace.plan.facts.models import model_config
from millrace.plan.model.memory import SPREAD as MEMORY_SPREAD
from millrace.plan.model.memory import MemoryFit, fit
from millrace.plan.model.posterior import BAR, NOISE, Posterior, interval, posterior, rates
from millrace.plan.model.profiles import with_rates
from millrace.plan.model.step_model import Description, StepModel
from millrace.plan.predict.load import Load, Settings
from millrace.plan.predict.loops import Replica, Steady

# Metric -> the noise of which measured metric it has.
METRICS = {
    "total_tokens": "total", "output_tokens": "output", "requests": "total", "ttft": "ttft",
    "tpot": "tpot", "itl_p50": "itl_p50", "itl_p99": "itl_p99", "joules": "joules",
}  # fmt: skip
KNEE = 0.9  # share of the capacity beyond which an open loop's TTFT is no number


class Bar(msgspec.Struct, frozen=True):
    """A value with its 80% interval."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Bar:
        return Bar(self.value * factor, self.low * factor, self.high * factor)

    def inverse(self, factor: float) -> Bar:
        """factor / value."""
        return Bar(factor / self.value, factor / self.high, factor / self.low)


@dataclass(frozen=True, slots=True)
class Deployment:
    """Replicas of one kind. utilization: share of a GPU's memory that an engine takes."""

    description: Description
    settings: Settings
    replicas: int = 1
    utilization: float = 0.92

    @property
    def gpus(self) -> int:
        return self.replicas * self.description.tensor


@dataclass(frozen=True, slots=True)
class Prediction:
    """bars: by the names of METRICS; throughput and requests are those of all replicas, times in
    seconds, joules for a token. load: of one replica. steady: of one replica. rests_on: what the
    parameters come from. shares: of the variance of the throughput, by cause. overload: why the
    load cannot be served, with the band of rates that can; then latencies are missing."""

    deployment: Deployment
    load: Load
    steady: Steady
    memory: MemoryFit
    bars: dict[str, Bar]
    rests_on: str
    shares: dict[str, float]
    overload: str = ""


class Planner:
    """Predictions from one fit. known: None: the one that ships."""

    def __init__(self, known: Posterior | None = None) -> None:
        self.known = known or posterior()

    def predict(self, deployment: Deployment, load: Load, *, bars: bool = True) -> Prediction:
        """load: of all replicas together. bars: without them values alone, 40 times as fast.

        Raises ConfigError with what would work if the model does not fit.
        """
        d = deployment.description
        check(d)
        load.check()
        each = share_of(load, deployment.replicas)
        memory = self.memory(deployment, each)
        point = _Point(self, deployment, each)
        logarithms = self.known.logarithms(d.engine, d.gpu)
        steady, overload = point.steady(logarithms)
        values = point.values(logarithms)
        found = {name: Bar(float(v), float(v), float(v)) for name, v in _named(values).items()}
        shares: dict[str, float] = {}
        if bars:
            found, shares = self._bars(point, logarithms)
        if overload:
            found = {k: v for k, v in found.items() if k not in ("ttft", "tpot", "itl_p50",
                                                                 "itl_p99")}  # fmt: skip
        source = self.known.source(d.engine, d.gpu)
        return Prediction(deployment, each, steady, memory, found, source, shares, overload)

    def model(self, d: Description, logarithms: Any | None = None) -> StepModel:
        """A step model, of the fit or of other parameters."""
        found = self.known.logarithms(d.engine, d.gpu) if logarithms is None else logarithms
        return with_rates(d, rates(found), self.known)

    def memory(self, deployment: Deployment, load: Load, slack: float = 1.0) -> MemoryFit:
        return fit(
            deployment.description,
            mean_tokens=load.context,
            max_num_seqs=deployment.settings.max_num_seqs,
            max_num_batched_tokens=deployment.settings.max_num_batched_tokens,
            utilization=deployment.utilization,
            slack=slack,
        )

    def _bars(self, point: _Point, logarithms: Any) -> tuple[dict[str, Bar], dict[str, float]]:
        d = point.deployment.description
        matrix = self.known.covariance(d.engine, d.gpu)
        noise = np.array([NOISE[kind] for kind in METRICS.values()]) * self.known.fit.discrepancy
        middle, low, high = interval(point.values, logarithms, matrix, noise * 0)
        rest = {"model": (noise, noise)}
        texts = replace(point, shift=1.0), replace(point, shift=-1.0)
        rest["text"] = _both(texts, logarithms, middle)
        rooms = replace(point, slack=1 + MEMORY_SPREAD), replace(point, slack=1 - MEMORY_SPREAD)
        rest["memory"] = _both(rooms, logarithms, middle)
        down, up = np.log(middle / low) / BAR, np.log(high / middle) / BAR
        causes = {"parameters": (down, up), **rest}
        below = np.sqrt(sum(pair[0] ** 2 for pair in causes.values()))
        above = np.sqrt(sum(pair[1] ** 2 for pair in causes.values()))
        found = {
            name: Bar(float(m), float(m * np.exp(-BAR * b)), float(m * np.exp(BAR * a)))
            for name, m, b, a in zip(METRICS, middle, below, above, strict=True)
        }
        variances = {k: float(v[0][0] ** 2 + v[1][0] ** 2) for k, v in causes.items()}
        total = sum(variances.values()) or 1.0
        return found, {name: round(v / total, 3) for name, v in variances.items()}


@dataclass
class _Point:
    """One deployment under one load, for any parameters."""

    planner: Planner
    deployment: Deployment
    load: Load
    slack: float = 1.0
    shift: float = 0.0

    def replica(self, logarithms: Any) -> Replica:
        memory = self.planner.memory(self.deployment, self.load, self.slack)
        settings = msgspec.structs.replace(
            self.deployment.settings, max_num_seqs=max(1, memory.max_num_seqs)
        )
        model = self.planner.model(self.deployment.description, logarithms)
        return Replica(model, self.load, settings, self.shift)

    def steady(self, logarithms: Any) -> tuple[Steady, str]:
        """The long run, and why it is an overload, if it is one."""
        replica = self.replica(logarithms)
        if self.load.concurrency:
            return replica.closed(self.load.concurrency), ""
        found = replica.open(self.load.rate)
        most = replica.capacity()
        if found is not None and self.load.rate <= KNEE * most:
            return found, ""
        full = replica.closed(float(replica.settings.max_num_seqs))
        count = self.deployment.replicas
        return found or full, (
            f"{self.load.rate * count:.3g} requests/s are beyond the knee: TTFT stays bounded up "
            f"to some {0.8 * most * count:.3g} to {KNEE * most * count:.3g} requests/s"
        )

    def values(self, logarithms: Any) -> Any:
        """The metrics, in the order of METRICS; throughputs of all replicas."""
        steady, _ = self.steady(logarithms)
        count = self.deployment.replicas
        total, out, requests = steady.total_tokens, steady.output_tokens, steady.requests
        if self.load.requests and self.load.concurrency:
            whole = self.load.requests * (self.load.input + self.load.output)
            factor = whole / self.replica(logarithms).run_seconds(steady, self.load.concurrency)
            out, requests, total = out * factor / total, requests * factor / total, factor
        return np.array(
            [total * count, out * count, requests * count, steady.ttft, steady.tpot,
             steady.itl_p50, steady.itl_p99, steady.joules]
        )  # fmt: skip


def _both(sides: tuple[_Point, _Point], logarithms: Any, middle: Any) -> tuple[Any, Any]:
    """(down, up): logarithms by which the metrics move if a cause moves to either side."""
    moved = [np.log(side.values(logarithms) / middle) for side in sides]
    return np.maximum(0, -np.minimum(*moved)), np.maximum(0, np.maximum(*moved))


def _named(values: Any) -> dict[str, float]:
    return dict(zip(METRICS, values, strict=True))


def share_of(load: Load, replicas: int) -> Load:
    """The load of one of so many replicas."""
    return msgspec.structs.replace(
        load,
        concurrency=load.concurrency / replicas,
        rate=load.rate / replicas,
        requests=load.requests / replicas,
    )


def check(d: Description) -> None:
    """Raise ConfigError, with what would work, for what no engine runs."""
    gpu, config = find_gpu(d.gpu), model_config(d.model)
    if d.drafts and not config.mtp_layers:
        raise ConfigError(f"{d.model} has no draft head: use 0 drafts")
    if d.weights == "fp8" and not gpu.fp8 and not gpu.cpu:
        raise ConfigError(f"{gpu.name} has no FP8 unit; weights in bf16 or int4 would run")
    if d.weights in ("nvfp4", "mxfp4") and not gpu.fp4:
        raise ConfigError(f"{gpu.name} has no FP4 unit; weights in fp8 or int4 would run")
    if config.num_heads % d.tensor:
        fits = [n for n in (1, 2, 4, 8, 16) if config.num_heads % n == 0]
        raise ConfigError(
            f"{d.tensor} ranks do not divide {config.num_heads} heads of {d.model}; "
            f"{', '.join(map(str, fits))} do"
        )
    if d.max_model_len > config.max_positions:
        raise ConfigError(
            f"a context of {d.max_model_len} is more than the {config.max_positions} positions of "
            f"{d.model}; --max-model-len {config.max_positions} works"
        )
