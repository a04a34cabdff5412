"""Leaves rows out, fits the others, and predicts what was left out with its 80% bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from millrace.plan.calibration.fit import ROBUST, Solution, noise
from millrace.plan.calibration.rows import predict
from millrace.plan.facts.measured import Row, measured
from millrace.plan.model.posterior import (
    Posterior,
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


def leave_out(solution: Solution, group: Callable[[Row], str]) -> list[Held]:
    """Each group of rows predicted from the others: one step of the fit without them, from the
    solution with them, then the row itself with the parameters found."""
    found: dict[int, Held] = {}
    rows = solution.rows
    for name in sorted({group(row) for row in rows}):
        out = [i for i, row in enumerate(rows) if group(row) == name]
        found.update(zip(out, _without(solution, out), strict=True))
    return [found[i] for i in range(len(rows))]


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


def explained(known: Posterior | None = None) -> list[Held]:
    """Every measured row, predicted by a fit to all of them, with its bar."""
    known = known or posterior()
    found = []
    for row in measured():

        def value(logarithms: Any, row: Row = row) -> float:
            return predict(row, rates(logarithms))

        middle, low, high = interval(
            value,
            known.logarithms(row.engine, row.gpu),
            known.covariance(row.engine, row.gpu),
            noise(row),
        )
        found.append(Held(row, float(middle), float(low), float(high)))
    return found
