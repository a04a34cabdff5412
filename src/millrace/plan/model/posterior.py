"""What is known of the parameters after a fit: values, covariance, and the bars that follow.

The logarithm of a rate of an engine on a GPU is base + engine + GPU. Each of the three has a prior.
Where there are no rows of an engine or a GPU, its part is 0 with the prior's spread, so bars are
wide there. Errors are taken as normal in the logarithm (Laplace's approximation).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from millrace.errors import ConfigError
from millrace.plan.model.rates import PARAMETERS
from millrace.plan.model.step_model import Description

NAMES = tuple(PARAMETERS)
# Relative standard deviation of a measurement and of what the model leaves out, by metric.
NOISE = {
    "total": 0.07, "output": 0.08, "tpot": 0.08, "ttft": 0.25, "itl_p50": 0.12, "itl_p99": 0.15,
    "step": 0.06, "joules": 0.10,
}  # fmt: skip
TIGHT = 1e-6  # spread of what a parameter does not have
SMALL = 2e-4  # variance of an axis that moves nothing by more than 1.4%
BAR = 1.2816  # standard deviations of an 80% interval of a normal distribution


class Sensitivity(msgspec.Struct, frozen=True):
    """How the logarithm of a row's prediction moves with the logarithms of its rates."""

    id: str
    engine: str
    gpu: str
    jacobian: list[float]
    noise: float


class Fit(msgspec.Struct, frozen=True):
    """What a fit found. values: `name`, `name/engine:E` or `name/gpu:G` -> logarithm, relative to
    the prior's mean. rows: for the covariance. discrepancy: factor of all noises, from the rows
    themselves."""

    date: str
    values: dict[str, float]
    rows: list[Sensitivity]
    discrepancy: float = 1.0


@dataclass(frozen=True)
class Space:
    """The axes of the fit: for each parameter its base, its engines and its GPUs."""

    engines: tuple[str, ...]
    gpus: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(NAMES) * (1 + len(self.engines) + len(self.gpus))

    def names(self) -> list[str]:
        kinds = ["", *(f"/engine:{e}" for e in self.engines), *(f"/gpu:{g}" for g in self.gpus)]
        return [name + kind for kind in kinds for name in NAMES]

    def spreads(self) -> Any:
        """Standard deviation of each axis before any row."""
        found = [PARAMETERS[name].spread for name in NAMES]
        found += [PARAMETERS[name].engines for _ in self.engines for name in NAMES]
        found += [PARAMETERS[name].gpus for _ in self.gpus for name in NAMES]
        return np.maximum(np.array(found), TIGHT)

    def blocks(self, engine: str, gpu: str) -> list[int]:
        """First axes of the base, of the engine, and of the GPU, where they have some."""
        found = [0]
        if engine in self.engines:
            found.append(len(NAMES) * (1 + self.engines.index(engine)))
        if gpu in self.gpus:
            found.append(len(NAMES) * (1 + len(self.engines) + self.gpus.index(gpu)))
        return found

    def logarithms(self, theta: Any, engine: str, gpu: str) -> Any:
        """Of the rates, relative to the priors' means."""
        n = len(NAMES)
        return np.sum([theta[i : i + n] for i in self.blocks(engine, gpu)], axis=0)

    def spread(self, jacobian: Any, engine: str, gpu: str) -> Any:
        """The row of a Jacobian in all axes."""
        found = np.zeros(self.size)
        for first in self.blocks(engine, gpu):
            found[first : first + len(NAMES)] += jacobian
        return found

    def unseen(self, engine: str, gpu: str) -> Any:
        """Variance of each rate's logarithm for an engine or a GPU that is no axis."""
        found = np.zeros(len(NAMES))
        for i, name in enumerate(NAMES):
            found[i] += 0.0 if engine in self.engines else PARAMETERS[name].engines ** 2
            found[i] += 0.0 if gpu in self.gpus else PARAMETERS[name].gpus ** 2
        return found


def rates(logarithms: Any) -> dict[str, float]:
    """From logarithms relative to the priors' means; shares stay below 1."""
    found = {}
    for name, value in zip(NAMES, logarithms, strict=True):
        p = PARAMETERS[name]
        rate = p.mean * float(np.exp(np.clip(value, -5, 5)))
        found[name] = min(rate, 0.97) if p.unit.startswith("share") else rate
    return found


def covariance(space: Space, lines: Any, weights: Any) -> Any:
    """Of the axes, after rows of these lines, each with a weight of 1 / noise."""
    scaled = lines * weights[:, None]
    return np.linalg.inv(scaled.T @ scaled + np.diag(1 / space.spreads() ** 2))


def rate_covariance(space: Space, spread: Any, engine: str, gpu: str) -> Any:
    """Of the logarithms of the rates of one engine on one GPU."""
    n, blocks = len(NAMES), space.blocks(engine, gpu)
    found = np.diag(space.unseen(engine, gpu))
    for a in blocks:
        for b in blocks:
            found += spread[a : a + n, b : b + n]
    return found


def interval(
    function: Callable[[Any], Any], logarithms: Any, matrix: Any, own: Any
) -> tuple[Any, Any, Any]:
    """(value, low, high) of an 80% interval of one value, or of several in an array. The rates are
    moved by one standard deviation along each axis of their covariance, to both sides, since some
    act on one side only. own: standard deviation of the logarithm of what is measured besides."""
    middle = np.asarray(function(logarithms), dtype=float)
    sizes, axes = np.linalg.eigh(matrix)
    up = down = np.asarray(own, dtype=float) ** 2
    for size, axis in zip(sizes, axes.T, strict=True):
        if size < SMALL:
            continue
        for side in (1, -1):
            moved = np.log(np.asarray(function(logarithms + side * np.sqrt(size) * axis)) / middle)
            up, down = up + np.maximum(moved, 0) ** 2, down + np.minimum(moved, 0) ** 2
    return middle, middle * np.exp(-BAR * np.sqrt(down)), middle * np.exp(BAR * np.sqrt(up))


class Calibration(msgspec.Struct, frozen=True):
    """What `millrace plan calibrate` writes. logarithms: of the rates, relative to the priors'
    means, in the order of the parameters' names. covariance: of them. error: median relative error
    of the steps that it was fitted to. before: the same with the fit that ships."""

    date: str
    description: Description
    names: list[str]
    logarithms: list[float]
    covariance: list[list[float]]
    observations: int
    error: float
    before: float
    jitter: float


# --- files --------------------------------------------------------------------------------------


@functools.cache
def shipped() -> Fit:
    """The fit to all measured rows that ships."""
    content = resources.files("millrace.plan.facts").joinpath("fit.json").read_bytes()
    return msgspec.json.decode(content, type=Fit)


def read_calibration(path: Path) -> Posterior:
    """The shipped fit with what `millrace plan calibrate` wrote in its place for one engine on one
    device. Raises ConfigError if the file is none."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Calibration)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"{path}: no calibration ({error}); `millrace plan calibrate` writes one"
        ) from None
    if found.names != list(NAMES):
        raise ConfigError(f"{path}: made by another version; calibrate again")
    return Posterior(shipped(), found)


class Posterior:
    """A fit, ready for questions. own: what replaces it for one engine on one device."""

    def __init__(self, fit: Fit, own: Calibration | None = None) -> None:
        self.fit, self.own = fit, own
        self.space = Space(
            tuple(sorted({r.engine for r in fit.rows})), tuple(sorted({r.gpu for r in fit.rows}))
        )
        self._theta = np.array([fit.values.get(name, 0.0) for name in self.space.names()])
        self._spread = self._covariance()

    def _covariance(self) -> Any:
        rows = self.fit.rows
        lines = np.array(
            [self.space.spread(np.array(r.jacobian), r.engine, r.gpu) for r in rows]
        ).reshape(len(rows), self.space.size)
        weights = np.array([1 / (r.noise * self.fit.discrepancy) for r in rows])
        return covariance(self.space, lines, weights)

    def _is_own(self, engine: str, gpu: str) -> bool:
        own = self.own
        return own is not None and (own.description.engine, own.description.gpu) == (engine, gpu)

    def logarithms(self, engine: str, gpu: str) -> Any:
        if self.own is not None and self._is_own(engine, gpu):
            return np.array(self.own.logarithms)
        return self.space.logarithms(self._theta, engine, gpu)

    def rates(self, engine: str, gpu: str) -> dict[str, float]:
        return rates(self.logarithms(engine, gpu))

    def covariance(self, engine: str, gpu: str) -> Any:
        if self.own is not None and self._is_own(engine, gpu):
            return np.array(self.own.covariance)
        return rate_covariance(self.space, self._spread, engine, gpu)

    def source(self, engine: str, gpu: str) -> str:
        """What the rates of an engine on a GPU rest on, in words."""
        if self.own is not None and self._is_own(engine, gpu):
            count = self.own.observations
            return f"a calibration of {self.own.date} with {count} steps and runs"
        both = sum(r.engine == engine and r.gpu == gpu for r in self.fit.rows)
        if both:
            return f"{both} measured rows of {engine} on {gpu}"
        one = sum(r.engine == engine for r in self.fit.rows)
        two = sum(r.gpu == gpu for r in self.fit.rows)
        return f"no row of {engine} on {gpu}: {one} of the engine, {two} of the GPU, and priors"


@functools.cache
def posterior() -> Posterior:
    """The one that ships."""
    return Posterior(shipped())
