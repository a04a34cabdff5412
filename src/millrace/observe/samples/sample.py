"""What is stored of one moment: figures of one source, with labels, on the observer's clock."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Key = tuple[str, str, str]  # of a series: name, source, labels
Points = dict[Key, tuple[Array, Array]]  # times and values of each series
KEY = ("name", "source", "labels")


class Row(NamedTuple):
    """One figure. t: seconds since 1970 on the observer's clock, which never jumps in a run.
    source: what it comes from: `host`, or a target's address. labels: as JSON, sorted."""

    t: float
    source: str
    name: str
    labels: str
    value: float


def labels_text(labels: Mapping[str, str]) -> str:
    return json.dumps(labels, sort_keys=True, separators=(",", ":")) if labels else ""


def rows_of(t: float, source: str, figures: Mapping[str, float], **labels: str) -> list[Row]:
    """Figures that share their labels."""
    text = labels_text(labels)
    return [Row(t, source, name, text, value) for name, value in figures.items()]


def first(rows: Iterable[Row], name: str) -> float | None:
    """The value of the first row with this name."""
    return next((row.value for row in rows if row.name == name), None)


def points_of(rows: Iterable[Row]) -> Points:
    """Rows as series."""
    found: dict[Key, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        found[row.name, row.source, row.labels].append((row.t, row.value))
    return {key: (t, v) for key, points in found.items() for t, v in [np.array(points).T]}
