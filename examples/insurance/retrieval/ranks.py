"""Ranks instead of scores, so that scores of different kinds can be added."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

RANK_OFFSET = 10  # of reciprocal rank fusion: small, since a scope has some forty chunks


def reciprocal(scores: NDArray[Any]) -> NDArray[np.float64]:
    """1 / (RANK_OFFSET + rank) for each score; the highest has rank 0."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    made: NDArray[np.float64] = 1 / (RANK_OFFSET + ranks)
    return made


def reciprocal_of_shared(scores: NDArray[Any]) -> NDArray[np.float64]:
    """The same, and nothing for a score of 0: such a text has nothing in common with the query."""
    return np.where(scores > 0, reciprocal(scores), 0.0)
