"""How likely a setting fails: where the walls may be, given what worked and what failed.

What a setting takes of memory, or of a server's stability, is nearly a sum of what its knobs take,
and a wall is a limit of that sum. Which parts the knobs have, and where the limit is, is not known:
so many guesses are held that agree with the trials, and a setting is as risky as the share of the
guesses by which it fails. A wall that nobody hit yet may be anywhere beyond what worked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from millrace.tune.space.knobs import Risk, Space, Value
from millrace.tune.trials.history import Trial

Matrix = NDArray[np.float64]
_KINDS: tuple[Risk, ...] = ("memory", "room", "stability")
_ALMOST = 0.98  # the largest risk: certain is only what failed
_GUESSES = 192
_STEPS = 60  # of each guess, on its way to agree with the trials
_SOFT = 0.015  # of the sum at the riskiest setting: how sharp a wall is
_STRIDE = 0.35  # of a step, as a factor
_HIGHEST = 2.2  # limit, of the same: above 1 there is no wall, which is as likely at first


class RiskMap:
    """What is known of a space's walls, from all trials."""

    def __init__(self, space: Space, trials: Sequence[Trial]) -> None:
        self._space = space
        fine = [trial.settings for trial in trials if trial.feasible]
        self._walls = []
        for kind in _KINDS:
            failed = [t.settings for t in trials if t.failure and t.failure.risk == kind]
            if any(kind in knob.riskier for knob in space.knobs):
                self._walls.append(_Wall(space, kind, fine, failed))

    def risks(self, settings: Sequence[Mapping[str, Value]]) -> NDArray[np.float64]:
        """The probability that each setting fails."""
        fine = np.ones(len(settings))
        for wall in self._walls:
            fine *= 1.0 - wall.risks(settings)
        return np.minimum(1.0 - fine, _ALMOST)


class _Wall:
    """Guesses at one wall: parts of the knobs (guesses x knobs, each row with a sum of 1), and
    limits. They are drawn from a wide prior and moved by Metropolis' rule, with fixed seeds."""

    def __init__(
        self,
        space: Space,
        kind: Risk,
        fine: Sequence[Mapping[str, Value]],
        failed: Sequence[Mapping[str, Value]],
    ) -> None:
        self._knobs = [knob for knob in space.knobs if kind in knob.riskier]
        self._up = np.array([knob.riskier[kind] == "up" for knob in self._knobs])
        self._known = np.vstack([self._places(fine), self._places(failed)])
        self._sides = np.array([1.0] * len(fine) + [-1.0] * len(failed))
        rng = np.random.default_rng(len(self._sides))
        parts = rng.exponential(size=(_GUESSES, len(self._knobs)))
        limits = rng.uniform(0.05, _HIGHEST, size=_GUESSES)
        likely = self._likelihood(parts, limits)
        for _ in range(_STEPS):
            moved = parts * np.exp(_STRIDE * rng.normal(size=parts.shape))
            other = limits * np.exp(_STRIDE * rng.normal(size=_GUESSES))
            there = self._likelihood(moved, other)
            # An exponential prior of the parts and a flat one of the limit, in logarithms.
            gain = there - likely + (np.log(moved / parts) - moved + parts).sum(axis=1)
            gain += np.log(other / limits)
            taken = np.log(rng.random(_GUESSES)) < np.where(other < _HIGHEST, gain, -np.inf)
            parts = np.where(taken[:, None], moved, parts)
            limits, likely = np.where(taken, other, limits), np.where(taken, there, likely)
        self._parts, self._limits = parts, limits

    def risks(self, settings: Sequence[Mapping[str, Value]]) -> NDArray[np.float64]:
        """The share of the guesses by which each setting fails."""
        left = self._left(self._parts, self._limits, self._places(settings))
        found: NDArray[np.float64] = (1.0 / (1.0 + np.exp(left))).mean(axis=0)
        return found

    def _likelihood(self, parts: Matrix, limits: NDArray[np.float64]) -> NDArray[np.float64]:
        """The logarithm of how likely each guess makes the trials."""
        left: Matrix = self._left(parts, limits, self._known) * self._sides
        found: NDArray[np.float64] = -np.logaddexp(0.0, -left).sum(axis=1)
        return found

    def _left(self, parts: Matrix, limits: NDArray[np.float64], places: Matrix) -> Matrix:
        """guesses x settings: how far below the limit a sum is, in units of a wall's sharpness."""
        sums = parts @ places.T / parts.sum(axis=1)[:, None]
        found: Matrix = np.clip((limits[:, None] - sums) / _SOFT, -50.0, 50.0)
        return found

    def _places(self, settings: Sequence[Mapping[str, Value]]) -> Matrix:
        """settings x knobs: 0 at the safe end of a knob, 1 at the risky one."""
        rows = [
            [k.index(one[k.name]) / max(1, len(k.values) - 1) for k in self._knobs]
            for one in settings
        ]
        places = np.asarray(rows, dtype=np.float64).reshape(len(settings), len(self._knobs))
        found: Matrix = np.where(self._up, places, 1.0 - places)
        return found
