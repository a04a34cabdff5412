"""Leaves rows out, fits the others, and predicts what was left out with its 80% bar."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from millrace.plan.calibration.fit import ROBUST, Solution, noise
from millrace.plan.calibration.rows import predict
from millrace.plan.facts.measured import Row, measured
from millrace.plan.model.posterior import (
    BAR,
    Space,
    covariance,
    interval,
    posterior,
    rate_covariance,
    rates,
)


@dataclass(frozen=True, slots=True)
class Held:
    """A row that was left out: what was predicted, and its 80% bar."""

    row: Row
    predicted: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Relative, of the prediction."""
        return self.predicted / self.row.value - 1

    @property
    def inside(self) -> bool:
        return self.low <= self.row.value <= self.high


def leave_out(
    solution: Solution, group: Callable[[Row], str], names: Collection[str] | None = None
) -> list[Held]:
    """Each group of rows predicted from the others: one step of the fit without them, from the
    solution with them, then the row itself with the parameters found. names: of the groups that
    are wanted; None: all."""
    found: dict[int, Held] = {}
    rows = solution.rows
    for name in sorted({group(row) for row in rows}) if names is None else names:
        out = [i for i, row in enumerate(rows) if group(row) == name]
        found.update(zip(out, _without(solution, out), strict=True))
    return [found[i] for i in sorted(found)]


def _without(solution: Solution, out: Sequence[int]) -> list[Held]:
    space = solution.space
    keep = np.array([i for i in range(len(solution.rows)) if i not in set(out)])
    sizes = np.abs(solution.residuals / solution.noises)
    weights = np.sqrt(np.minimum(1.0, ROBUST / np.maximum(sizes, 1e-9))) / solution.noises
    lines, kept = solution.lines[keep], weights[keep]
    wanted = (solution.residuals[keep] + lines @ solution.theta) * kept
    spread = covariance(space, lines, kept)
    theta = spread @ ((lines * kept[:, None]).T @ wanted)
    return [_held(solution.rows[i], space, theta, spread) for i in out]


def _held(row: Row, space: Space, theta: Any, spread: Any) -> Held:
    logarithms = space.logarithms(theta, row.engine, row.gpu)
    matrix = rate_covariance(space, spread, row.engine, row.gpu)
    middle, low, high = interval(
        lambda found: predict(row, rates(found)), logarithms, matrix, noise(row)
    )
    return Held(row, float(middle), float(low), float(high))


def explained() -> list[Held]:
    """Every measured row, predicted by the fit to all of them, with its bar by the sensitivities
    that the fit has kept."""
    known, rows = posterior(), {row.id: row for row in measured()}
    found = []
    for one in known.fit.rows:
        row, slopes = rows[one.id], np.array(one.jacobian)
        middle = predict(row, known.rates(one.engine, one.gpu))
        variance = slopes @ known.covariance(one.engine, one.gpu) @ slopes + one.noise**2
        bar = float(np.exp(BAR * np.sqrt(variance)))
        found.append(Held(row, middle, middle / bar, middle * bar))
    return found
