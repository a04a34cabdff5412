"""Fits the planner to every measured row, and predicts each row from the others.

    python benchmarks/plan_golden.py      # writes plan/facts/fit.json and tests/plan/golden.json

Minutes on one core: 3 for the fit, 3 for what is left out (each row, each GPU, each engine).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import msgspec

from millrace.plan.calibration.fit import solve, space_of
from millrace.plan.calibration.holdout import Held, leave_out
from millrace.plan.facts.measured import Row, measured
from millrace.plan.model.posterior import Fit

ROOT = Path(__file__).resolve().parents[1]
GROUPS: dict[str, Callable[[Row], str]] = {
    "row": lambda row: row.id,
    "gpu": lambda row: row.gpu,
    "engine": lambda row: row.engine,
}


def write_fit(fit: Fit, path: Path) -> None:
    """As JSON with a line for each row."""
    lines = ",\n".join(f"  {json.dumps(msgspec.to_builtins(row))}" for row in fit.rows)
    values = ",\n".join(f"  {json.dumps(k)}: {v}" for k, v in fit.values.items() if v)
    path.write_text(
        f'{{\n "date": "{fit.date}",\n "discrepancy": {fit.discrepancy},\n'
        f' "values": {{\n{values}\n }},\n "rows": [\n{lines}\n ]\n}}\n'
    )


def entry(held: Held) -> dict[str, Any]:
    figures = {"predicted": held.predicted, "low": held.low, "high": held.high}
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def start() -> Any:
    """The parameters of the fit that is there, by their names; what is new begins at its prior."""
    path = ROOT / "src" / "millrace" / "plan" / "facts" / "fit.json"
    values = json.loads(path.read_bytes())["values"]
    rows = measured()
    return [values.get(name, 0.0) for name in space_of(rows).names()]


def main() -> None:
    solution = solve(measured(), start=start())
    write_fit(
        solution.export(date.today().isoformat()),
        ROOT / "src" / "millrace" / "plan" / "facts" / "fit.json",
    )
    golden: dict[str, dict[str, Any]] = {row.id: {} for row in measured()}
    for name, group in GROUPS.items():
        for held in leave_out(solution, group):
            golden[held.row.id][name] = entry(held)
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
    (ROOT / "tests" / "plan" / "golden.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
