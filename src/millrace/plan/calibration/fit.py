"""The fit: parameters from measured rows, by least squares with priors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from millrace.plan.calibration.rows import predict
from millrace.plan.facts.measured import Row
from millrace.plan.facts.models import model_config
from millrace.plan.model.posterior import NAMES, NOISE, Fit, Sensitivity, Space, rates

STEP = 0.02  # of a logarithm, for derivatives
ROBUST = 2.5  # standard deviations beyond which a row pulls no harder


# Parameters that some rows do not depend on -> whether a row does. It saves a third of the time.
_IDLE: dict[str, Callable[[Row], bool]] = {
    "chunk_server": lambda row: row.served,
    "request_server": lambda row: row.served,
    "away": lambda row: row.served,
    "sum_latency": lambda row: row.tensor > 1,
    "sum_rate": lambda row: row.tensor > 1,
    "draft_host": lambda row: row.drafts > 1,
    "energy_flop": lambda row: row.metric == "joules",
    "energy_byte": lambda row: row.metric == "joules",
    "grouped": lambda row: model_config(row.model).experts is not None,
    "expert_stream": lambda row: model_config(row.model).experts is not None,
}


def jacobian(row: Row, logarithms: Any) -> tuple[float, Any]:
    """(logarithm of the prediction, its derivatives by the logarithms of the rates)."""
    here = np.log(predict(row, rates(logarithms)))
    slopes = np.zeros(len(NAMES))
    for i, name in enumerate(NAMES):
        if name in _IDLE and not _IDLE[name](row):
            continue
        moved = logarithms.copy()
        moved[i] += STEP
        slopes[i] = (np.log(predict(row, rates(moved))) - here) / STEP
    return float(here), slopes


def noise(row: Row) -> float:
    """Standard deviation of the logarithm: by metric, the doubt, and the spread between runs."""
    found = float(np.hypot(NOISE[row.metric], row.doubt))
    if row.low is not None and row.high is not None:
        found = float(np.hypot(found, np.log(row.high / row.low) / 3.3))
    return found


@dataclass
class Solution:
    """A fit with all that leave-one-out needs. A: one line for each row."""

    rows: Sequence[Row]
    space: Space
    theta: Any
    lines: Any
    slopes: list[Any]
    noises: Any
    residuals: Any

    def export(self, date: str, discrepancy: float = 1.0) -> Fit:
        values = dict(
            zip(self.space.names(), (round(float(v), 5) for v in self.theta), strict=True)
        )
        found = [
            Sensitivity(r.id, r.engine, r.gpu, [round(float(v), 4) for v in s], round(float(n), 4))
            for r, s, n in zip(self.rows, self.slopes, self.noises, strict=True)
        ]
        return Fit(date, values, found, discrepancy)


def space_of(rows: Sequence[Row]) -> Space:
    """The axes of a fit to these rows."""
    return Space(tuple(sorted({r.engine for r in rows})), tuple(sorted({r.gpu for r in rows})))


def solve(rows: Sequence[Row], rounds: int = 12, start: Any = None) -> Solution:
    """The parameters that fit best. Gauss-Newton steps, each a linear least-squares problem."""
    from scipy.linalg import lstsq

    space = space_of(rows)
    theta = np.zeros(space.size) if start is None else np.array(start)
    noises = np.array([noise(row) for row in rows])
    observed = np.log([row.value for row in rows])
    prior = np.diag(1 / space.spreads())
    best: Solution | None = None
    for _ in range(rounds):
        pairs = [jacobian(row, space.logarithms(theta, row.engine, row.gpu)) for row in rows]
        slopes = [slope for _, slope in pairs]
        lines = np.array(
            [space.spread(s, r.engine, r.gpu) for s, r in zip(slopes, rows, strict=True)]
        )
        residuals = observed - np.array([here for here, _ in pairs])
        best = Solution(rows, space, theta, lines, slopes, noises, residuals)
        weights = _weights(residuals, noises) / noises
        system = np.vstack([lines * weights[:, None], prior])
        wanted = np.concatenate([(residuals + lines @ theta) * weights, np.zeros(space.size)])
        found = lstsq(system, wanted)[0]
        moved = np.clip(found - theta, -0.35, 0.35)
        theta = theta + moved
        if np.abs(moved).max() < 3e-3:
            break
    assert best is not None
    return best


def _weights(residuals: Any, noises: Any) -> Any:
    """Huber's: a row that nothing explains does not bend the rest."""
    size = np.abs(residuals / noises)
    return np.sqrt(np.minimum(1.0, ROBUST / np.maximum(size, 1e-9)))
