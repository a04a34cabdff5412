"""Every measured row, predicted from the others: errors, order, and bars that hold.

`golden.json` was written by `benchmarks/plan_golden.py`. These tests read it, check that the fit
that ships is that of today's rows and model, and leave a few rows out anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from millrace.plan.calibration.fit import Solution, jacobian, noise, space_of
from millrace.plan.calibration.holdout import leave_out
from millrace.plan.calibration.rows import predict
from millrace.plan.facts.measured import Row, measured
from millrace.plan.model.posterior import posterior, rates, shipped

GOLDEN: dict[str, dict[str, dict[str, float]]] = json.loads(
    (Path(__file__).parents[1] / "golden.json").read_text(encoding="utf-8")
)
ROWS = {row.id: row for row in measured()}
SPEED = ("total", "output", "tpot", "step")


def held(group: str, wanted: Callable[[Row], bool]) -> list[tuple[Row, dict[str, float]]]:
    return [(row, GOLDEN[row.id][group]) for row in ROWS.values() if wanted(row)]


def error(row: Row, entry: dict[str, float]) -> float:
    return abs(entry["predicted"] / row.value - 1)


def inside(row: Row, entry: dict[str, float]) -> bool:
    return entry["low"] <= row.value <= entry["high"]


def test_every_row_has_its_prediction() -> None:
    assert GOLDEN.keys() == ROWS.keys()
    assert all(entry.keys() == {"row", "gpu", "engine"} for entry in GOLDEN.values())


def test_one_row_left_out() -> None:
    """Median errors: 10% of throughput and time per token, 25% of the time to the first token."""
    assert median(error(*one) for one in held("row", lambda row: row.metric in SPEED)) < 0.10
    assert median(error(*one) for one in held("row", lambda row: row.metric == "ttft")) < 0.25
    every = held("row", lambda row: True)
    assert sum(inside(*one) for one in every) / len(every) >= 0.75


@pytest.mark.parametrize("group", ["gpu", "engine"])
def test_bars_hold_for_what_was_never_seen(group: str) -> None:
    """80% bars of a GPU or an engine without any row hold for 75% of its rows."""
    every = held(group, lambda row: True)
    assert sum(inside(*one) for one in every) / len(every) >= 0.75


def test_bars_are_no_wider_than_they_must_be() -> None:
    for group, most in (("row", 1.35), ("gpu", 2.5), ("engine", 3.0)):
        widths = [entry["high"] / entry["predicted"] for _, entry in held(group, lambda row: True)]
        assert 1.05 < median(widths) < most


def test_the_order_of_the_write_ups_settings() -> None:
    """Each predicted without itself."""
    ids = ("tp8", "tp8-mtp1", "dp8-no-mtp", "dp8-131k", "dp8-4096")
    found = [GOLDEN[f"write-up/{name}"]["row"]["predicted"] for name in ids]
    assert found == sorted(found)
    assert found[2] < GOLDEN["write-up/dp8-mtp1"]["row"]["predicted"]


def test_this_is_nearer_than_aisimulate() -> None:
    """On the rows for which that planner's figures are known, row for row left out."""
    both = held("row", lambda row: row.aisimulate is not None)
    ours = median(error(*one) for one in both)
    theirs = median(abs(row.aisimulate / row.value - 1) for row, _ in both if row.aisimulate)
    assert len(both) >= 9
    assert ours < theirs / 3


def test_the_fit_that_ships_is_of_these_rows() -> None:
    """Noises and, for some rows of each engine, sensitivities are those of today's model."""
    assert [one.id for one in shipped().rows] == list(ROWS)
    known = posterior()
    for one in shipped().rows[::23]:
        row = ROWS[one.id]
        assert one.noise == pytest.approx(noise(row), abs=1e-3)
        _, slopes = jacobian(row, known.logarithms(row.engine, row.gpu))
        assert slopes == pytest.approx(one.jacobian, abs=0.08), one.id


def test_leaving_out_gives_the_golden_figures() -> None:
    """For a few rows, from the fit that ships."""
    known = posterior()
    rows, space = list(ROWS.values()), space_of(list(ROWS.values()))
    theta: Any = np.array([known.fit.values.get(name, 0.0) for name in space.names()])
    slopes = [np.array(one.jacobian) for one in known.fit.rows]
    lines = np.array([space.spread(s, r.engine, r.gpu) for s, r in zip(slopes, rows, strict=True)])
    fitted = [predict(r, rates(space.logarithms(theta, r.engine, r.gpu))) for r in rows]
    residuals = np.log([row.value for row in rows]) - np.log(fitted)
    noises = np.array([noise(row) for row in rows])
    solution = Solution(rows, space, theta, lines, slopes, noises, residuals)
    chosen = ("write-up/dp8-mtp1", "millrace-h200/256-seqs", "gb10/prefill-8k")
    found = leave_out(solution, lambda row: row.id, chosen)
    assert {one.row.id for one in found} == set(chosen)
    for one in found:
        entry = GOLDEN[one.row.id]["row"]
        assert one.predicted == pytest.approx(entry["predicted"], rel=0.03)
        assert one.low == pytest.approx(entry["low"], rel=0.05)
