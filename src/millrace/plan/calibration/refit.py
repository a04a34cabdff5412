"""Fits one engine on one device to its own measurements, from what is known of it before.

The prior is the fit that ships: its rates for this engine and device, with their covariance. So a
parameter that the measurements say nothing about stays where it was, with its uncertainty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from millrace.errors import ConfigError
from millrace.plan.calibration.observations import Observation
from millrace.plan.model.posterior import (
    NAMES,
    Calibration,
    Posterior,
    posterior,
    rates,
    shipped,
)
from millrace.plan.model.profiles import with_rates
from millrace.plan.model.step_model import Description, StepModel

LEAST = 0.02  # relative standard deviation of an observation, at least
OWN = 0.04  # of what the model leaves out, for the fit


@dataclass(frozen=True)
class _Problem:
    description: Description
    observations: Sequence[Observation]
    known: Posterior
    centre: Any
    root: Any  # of the inverse of the prior's covariance

    def residuals(self, logarithms: Any) -> Any:
        prior = self.root @ (logarithms - self.centre)
        return np.concatenate([self.errors(logarithms) / self.spreads, prior])

    @property
    def spreads(self) -> Any:
        return np.array(
            [max(LEAST, OWN, o.spread / max(1, o.count) ** 0.5) for o in self.observations]
        )

    def errors(self, logarithms: Any) -> Any:
        """Logarithms of predicted over measured."""
        model = with_rates(self.description, rates(logarithms), self.known)
        return np.log([o.predicted(model) / o.seconds for o in self.observations])


def refit(
    description: Description,
    observations: Sequence[Observation],
    known: Posterior | None = None,
) -> Calibration:
    """The calibration of an engine on a device. Raises ConfigError if there is nothing to fit, or
    if scipy is missing."""
    if not observations:
        raise ConfigError("there is nothing to fit; give plan logs or results")
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise ConfigError("plan calibrate needs scipy: pip install 'millrace[plan]'") from None
    known = known or posterior()
    centre = known.logarithms(description.engine, description.gpu)
    spread = known.covariance(description.engine, description.gpu) + 1e-6 * np.eye(len(NAMES))
    problem = _Problem(
        description, observations, known, centre, np.linalg.cholesky(np.linalg.inv(spread)).T
    )
    found = least_squares(
        problem.residuals, centre, loss="soft_l1", diff_step=0.01, max_nfev=40, method="trf"
    )
    lines = found.jac[: len(observations)]
    matrix = np.linalg.inv(lines.T @ lines + np.linalg.inv(spread))
    jitters = [o.spread for o in observations if o.kind != "closed"]
    return Calibration(
        date=datetime.now(UTC).date().isoformat(),
        description=description,
        names=list(NAMES),
        logarithms=[round(float(v), 5) for v in found.x],
        covariance=[[round(float(v), 7) for v in row] for row in matrix],
        observations=sum(o.count for o in observations),
        error=_median(problem.errors(found.x)),
        before=_median(problem.errors(centre)),
        jitter=round(float(np.median(jitters)), 4) if jitters else 0.0,
    )


def _median(errors: Any) -> float:
    return round(float(np.median(np.abs(np.expm1(errors)))), 4)


def step_model_of(calibration: Calibration) -> StepModel:
    """The step model that a calibration found, for `StepModel.save` and the simulator."""
    d = calibration.description
    found = Posterior(shipped(), calibration)
    model = with_rates(d, found.rates(d.engine, d.gpu), found)
    return replace(model, jitter=calibration.jitter)
