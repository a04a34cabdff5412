"""How likely a setting fails: interpolated between what worked and what failed.

Both are seen along the risky directions of the knobs alone. A setting that is nowhere beyond one
that worked is safe; one that is many places beyond all that worked and few before one that failed
is likely to fail too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from millrace.tune.space.knobs import Risk, Space, Value
from millrace.tune.trials.history import Trial

_KINDS: tuple[Risk, ...] = ("memory", "room", "stability")
_AHEAD = 8.0  # places before a wall that was not seen yet
_ALMOST = 0.98  # the largest risk: certain is only what failed


class RiskMap:
    """What is known of a space's walls, from all trials."""

    def __init__(self, space: Space, trials: Sequence[Trial]) -> None:
        self._space = space
        self._worked = self._places([t.settings for t in trials if t.feasible])
        self._walls = []
        for kind in _KINDS:
            signs = np.array([_sign(k.riskier.get(kind)) for k in space.knobs], dtype=np.int64)
            failed = [t.settings for t in trials if t.failure and t.failure.risk == kind]
            self._walls.append((signs, self._places(failed)))

    def risks(self, settings: Sequence[Mapping[str, Value]]) -> NDArray[np.float64]:
        """The probability that each setting fails."""
        places = self._places(settings)
        fine = np.ones(len(settings))
        for signs, failed in self._walls:
            beyond = _least(places[:, None] - self._worked[None], signs, 0.0)
            before = _least(failed[None] - places[:, None], signs, _AHEAD)
            fine *= 1.0 - beyond / (beyond + before + 1e-9)
        return np.minimum(1.0 - fine, _ALMOST)

    def _places(self, settings: Sequence[Mapping[str, Value]]) -> NDArray[np.int64]:
        rows = [[knob.index(one[knob.name]) for knob in self._space.knobs] for one in settings]
        return np.asarray(rows, dtype=np.int64).reshape(len(settings), len(self._space.knobs))


def _sign(direction: str | None) -> int:
    return {"up": 1, "down": -1}.get(direction or "", 0)


def _least(
    apart: NDArray[np.int64], signs: NDArray[np.int64], otherwise: float
) -> NDArray[np.float64]:
    """Places in risky directions from the nearest of the others; `otherwise` without others."""
    steps = np.maximum(apart * signs, 0).sum(axis=2)
    found: NDArray[np.float64] = steps.min(axis=1, initial=10**6).astype(np.float64)
    return found if steps.shape[1] else np.full(len(steps), otherwise)
