"""A guess at what settings are worth, from the trials so far: a Gaussian process on logarithms.

Knobs mostly act as factors, so the logarithm of a throughput is nearly a sum of one function for
each knob. The kernel is such a sum, and a smaller part in which all knobs act together. With some
twenty trials of eight knobs this finds what a model without that knowledge does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from millrace.tune.space.knobs import Knob, Space, Value

Vector = NDArray[np.float64]
_LENGTH = 0.45  # of a knob's range: over how much of it a value tells of others
_TOGETHER = 0.1  # part of the variance that only all knobs together explain
_LEAST_SCALE = 0.4  # standard deviation of the logarithms, before anything is known
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
        self._known = self._places(settings)
        logs = np.log(np.maximum(np.asarray(values, dtype=np.float64), 1e-12))
        self._mean = float(logs.mean())
        self._scale = max(float(logs.std()), _LEAST_SCALE)
        doubt = (max(noise, _LEAST_NOISE) / self._scale) ** 2 * np.eye(len(logs))
        self._root = np.linalg.cholesky(self._kernel(self._known, self._known) + doubt)
        self._weights = self._solved((logs - self._mean) / self._scale)
        self._best = float(self._expected(self._known)[0].max())

    def improvements(self, settings: Sequence[Mapping[str, Value]]) -> Vector:
        """For each setting by how much it is expected to beat the best known one, where it does:
        the mean of max(0, difference of logarithms)."""
        mean, deviation = self._expected(self._places(settings))
        ahead = mean - self._best
        scaled = ahead / deviation
        density = np.exp(-0.5 * np.square(scaled)) / math.sqrt(2.0 * math.pi)
        below = np.array([0.5 * math.erfc(-value / math.sqrt(2.0)) for value in scaled])
        found: Vector = ahead * below + deviation * density
        return found

    def _expected(self, places: Vector) -> tuple[Vector, Vector]:
        """Mean and standard deviation of the logarithm at some places."""
        cross = self._kernel(places, self._known)
        half = np.linalg.solve(self._root, cross.T)
        variance = np.maximum(1.0 - np.square(half).sum(axis=0), 1e-6)
        return self._mean + self._scale * (cross @ self._weights), self._scale * np.sqrt(variance)

    def _solved(self, values: Vector) -> Vector:
        found: Vector = np.linalg.solve(self._root.T, np.linalg.solve(self._root, values))
        return found

    def _places(self, settings: Sequence[Mapping[str, Value]]) -> Vector:
        """settings x knobs: where each value lies in its knob's range, from 0 to 1."""
        rows = [[_place(knob, one[knob.name]) for knob in self._space.knobs] for one in settings]
        return np.asarray(rows, dtype=np.float64).reshape(len(settings), len(self._space.knobs))

    def _kernel(self, a: Vector, b: Vector) -> Vector:
        apart = a[:, None, :] - b[None, :, :]
        near = np.exp(-0.5 * np.square(apart / _LENGTH))
        free = [not knob.ordered for knob in self._space.knobs]
        near[:, :, free] = np.where(apart[:, :, free] == 0.0, 1.0, _OTHER)
        together = np.power(near.prod(axis=2), 1.0 / math.sqrt(near.shape[2]))
        found: Vector = (1.0 - _TOGETHER) * near.mean(axis=2) + _TOGETHER * together
        return found


def _place(knob: Knob, value: Value) -> float:
    return knob.index(value) / max(1, len(knob.values) - 1)
