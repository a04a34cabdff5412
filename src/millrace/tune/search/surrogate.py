"""A guess at what settings are worth, from the trials so far: Gaussian processes on logarithms.

Knobs mostly act as factors, so the logarithm of a throughput is nearly a sum of one function for
each knob. The kernel is such a sum, and a smaller part in which all knobs act together. How much
each knob matters, and how smoothly, is not known: so many guesses are held that agree with the
trials, and a setting is worth the mean of what they hope for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from millrace.tune.space.knobs import Knob, Space, Value

Array = NDArray[np.float64]
_GUESSES = 32
_STEPS = 24  # of each guess, on its way to agree with the trials
_STRIDE = 0.3  # of a step, as a factor
_LENGTH = 0.5  # of a knob's range: over how much of it a value tells of others, in the middle
_LENGTHS = 0.5  # how far guesses at it differ, as a logarithm's standard deviation
_SCALE = 0.35  # standard deviation of the logarithms, in the middle
_SCALES = 0.5
_TOGETHER = 0.05  # part of the variance that only all knobs together explain
_LEAST_NOISE = 0.01  # standard deviation of a logarithm between short runs
_OTHER = 0.3  # correlation of two alternatives without an order


class Surrogate:
    """settings and values: of the trials that worked; values above 0. noise: standard deviation of
    their logarithms."""

    def __init__(
        self,
        space: Space,
        settings: Sequence[Mapping[str, Value]],
        values: Sequence[float],
        noise: float = 0.0,
    ) -> None:
        self._space = space
        self._free = np.array([not knob.ordered for knob in space.knobs])
        self._known = self._places(settings)
        logs = np.log(np.maximum(np.asarray(values, dtype=np.float64), 1e-12))
        self._mean = float(logs.mean())
        self._logs = logs - self._mean
        self._noise = max(noise, _LEAST_NOISE)
        self._settle(np.random.default_rng(len(logs)))
        self._best = self._expected(self._known)[0].max(axis=1)

    def improvements(self, settings: Sequence[Mapping[str, Value]]) -> Array:
        """For each setting by how much it is expected to beat the best known one, where it does:
        the mean of max(0, difference of logarithms)."""
        mean, deviation = self._expected(self._places(settings))
        ahead = mean - self._best[:, None]
        scaled = ahead / deviation
        density = np.exp(-0.5 * np.square(scaled)) / math.sqrt(2.0 * math.pi)
        found: Array = (ahead * _below(scaled) + deviation * density).mean(axis=0)
        return found

    def _settle(self, rng: np.random.Generator) -> None:
        """Draw the guesses, and move them by Metropolis' rule. A guess is the parts that knobs have
        of the variance (exponential numbers), and normal numbers for the logarithms of lengths, one
        a knob, and of the scale."""
        count = len(self._space.knobs)
        parts = rng.exponential(size=(_GUESSES, count))
        drawn = rng.normal(size=(_GUESSES, count + 1))
        root, likely = self._fit(parts, drawn)
        for _ in range(_STEPS):
            moved = parts * np.exp(2 * _STRIDE * rng.normal(size=parts.shape))
            other = drawn + _STRIDE * rng.normal(size=drawn.shape)
            there, better = self._fit(moved, other)
            gain = better - likely - 0.5 * (np.square(other) - np.square(drawn)).sum(axis=1)
            gain += (np.log(moved / parts) - moved + parts).sum(axis=1)  # exponential prior
            taken = np.log(rng.random(_GUESSES)) < gain
            parts = np.where(taken[:, None], moved, parts)
            drawn = np.where(taken[:, None], other, drawn)
            root = np.where(taken[:, None, None], there, root)
            likely = np.where(taken, better, likely)
        self._parts, self._drawn = parts, drawn
        self._inverse = np.linalg.inv(root)
        solved = self._inverse @ self._logs
        self._weights = np.einsum("gnm,gn->gm", self._inverse, solved)

    def _fit(self, parts: Array, drawn: Array) -> tuple[Array, Array]:
        """For each guess: the Cholesky root of the trials' covariance, and the logarithm of how
        likely it makes the trials."""
        covariance = self._kernel(parts, drawn, self._known)
        noise = self._noise**2 * np.eye(len(self._logs))
        root = np.linalg.cholesky(covariance + noise).astype(np.float64)
        wanted = np.broadcast_to(self._logs[:, None], (*root.shape[:2], 1))
        solved = np.linalg.solve(root, wanted)[..., 0]
        diagonal = np.log(np.diagonal(root, axis1=1, axis2=2)).sum(axis=1)
        found: Array = -0.5 * np.square(solved).sum(axis=1) - diagonal
        return root, found

    def _expected(self, places: Array) -> tuple[Array, Array]:
        """guesses x settings: mean and standard deviation of the logarithm."""
        cross = self._kernel(self._parts, self._drawn, places)
        half = cross @ self._inverse.transpose(0, 2, 1)
        scale = _scales(self._drawn)[:, None]
        variance = np.maximum(np.square(scale) - np.square(half).sum(axis=2), 1e-6 * scale**2)
        return np.einsum("gsn,gn->gs", cross, self._weights), np.sqrt(variance)

    def _places(self, settings: Sequence[Mapping[str, Value]]) -> Array:
        """settings x knobs: where each value lies in its knob's range, from 0 to 1."""
        rows = [[_place(knob, one[knob.name]) for knob in self._space.knobs] for one in settings]
        return np.asarray(rows, dtype=np.float64).reshape(len(settings), len(self._space.knobs))

    def _kernel(self, parts: Array, drawn: Array, places: Array) -> Array:
        """guesses x places x trials: covariances by each guess."""
        apart = places[:, None, :] - self._known[None, :, :]
        lengths = _LENGTH * np.exp(_LENGTHS * drawn[:, :-1])
        near = np.exp(-0.5 * np.square(apart) / np.square(lengths)[:, None, None, :])
        near[..., self._free] = np.where(apart[..., self._free] == 0.0, 1.0, _OTHER)
        shares = parts / parts.sum(axis=1)[:, None]
        alone: Array = np.einsum("gabk,gk->gab", near, shares)
        far: Array = np.square(apart / _LENGTH).sum(axis=2) / math.sqrt(apart.shape[2])
        found: Array = (1.0 - _TOGETHER) * alone + _TOGETHER * np.exp(-0.5 * far)
        found *= np.square(_scales(drawn))[:, None, None]
        return found


def _scales(drawn: Array) -> Array:
    found: Array = _SCALE * np.exp(_SCALES * drawn[:, -1])
    return found


def _below(scaled: Array) -> Array:
    """The standard normal distribution."""
    found: Array = 0.5 * np.vectorize(math.erfc, otypes=[float])(-scaled / math.sqrt(2.0))
    return found


def _place(knob: Knob, value: Value) -> float:
    return knob.index(value) / max(1, len(knob.values) - 1)
