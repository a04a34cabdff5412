"""What an evaluation found: per item, in a JSON file and as tables.

Knows items and grades, not how the answers were got.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from millrace.errors import UserError
from millrace.eval.statistics import Paired, compare, wilson
from millrace.tasks import Grade, Item

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """One item's outcome. error: why there is no text, when the model could not be asked."""

    item: Item
    text: str
    grade: Grade
    seconds: float = 0.0
    tokens: int = 0
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "id": f"{self.item.task}/{self.item.index}",
            "kind": self.item.kind,
            "correct": self.grade.correct,
            "fields": dict(self.grade.fields),
            "expected": self.item.answer,
            "text": self.text,
            "error": self.error,
            "seconds": round(self.seconds, 4),
            "tokens": self.tokens,
        }


@dataclass(slots=True)
class Count:
    """How many of how many were right."""

    right: int = 0
    total: int = 0

    def add(self, right: bool) -> None:
        self.right += right
        self.total += 1

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else 0.0

    def as_json(self) -> dict[str, Any]:
        low, high = wilson(self.right, self.total)
        return {
            "right": self.right,
            "total": self.total,
            "accuracy": round(self.share, 6),
            "interval_95": [round(low, 6), round(high, 6)],
        }


@dataclass(slots=True)
class Summary:
    """Of one task: whole items, the kinds of question, all fields together, each field."""

    items: Count = field(default_factory=Count)
    kinds: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    all_fields: Count = field(default_factory=Count)
    fields: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    errors: int = 0

    def add(self, answer: Answer) -> None:
        self.items.add(answer.grade.correct)
        self.kinds[answer.item.kind].add(answer.grade.correct)
        self.errors += answer.error is not None
        for name, right in answer.grade.fields.items():
            self.fields[name].add(right)
            self.all_fields.add(right)

    def as_json(self) -> dict[str, Any]:
        return {
            "items": self.items.as_json(),
            "kinds": {name: count.as_json() for name, count in sorted(self.kinds.items())},
            "all_fields": self.all_fields.as_json() if self.all_fields.total else None,
            "fields": {name: count.as_json() for name, count in sorted(self.fields.items())},
            "errors": self.errors,
        }


def summarise(answers: Iterable[Answer]) -> dict[str, Summary]:
    """By task, in the order in which the tasks first appear."""
    tasks: dict[str, Summary] = {}
    for answer in answers:
        tasks.setdefault(answer.item.task, Summary()).add(answer)
    return tasks


# --- files -------------------------------------------------------------------------------------


def write_results(path: Path, run: Mapping[str, Any], answers: Iterable[Answer]) -> None:
    """run: what was asked of what (model, seed, settings); it is kept as it is."""
    answers = list(answers)
    document = {
        "format": FORMAT,
        "run": dict(run),
        "summary": {task: s.as_json() for task, s in summarise(answers).items()},
        "items": [answer.as_json() for answer in answers],
    }
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a file written by --json") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON; give a file written by --json") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path}: not results of `millrace eval`; give a file written by --json")
    return document


def compare_results(path_a: Path, path_b: Path) -> dict[str, Paired]:
    """By task. Both runs must have asked the same questions, which task, index and seed decide."""
    a, b = read_results(path_a), read_results(path_b)
    if a["run"].get("seed") != b["run"].get("seed"):
        raise UserError(
            f"{path_a} and {path_b} differ in their seed "
            f"({a['run'].get('seed')} and {b['run'].get('seed')}); compare runs of one seed"
        )
    right_a, right_b = _by_task(a), _by_task(b)
    if {t: r.keys() for t, r in right_a.items()} != {t: r.keys() for t, r in right_b.items()}:
        raise UserError(
            f"{path_a} and {path_b} asked different items; run both with the same --tasks and "
            "--num-items"
        )
    return {task: compare(right_a[task], right_b[task]) for task in right_a}


def _by_task(document: Mapping[str, Any]) -> dict[str, dict[str, bool]]:
    tasks: dict[str, dict[str, bool]] = defaultdict(dict)
    for item in document["items"]:
        tasks[item["id"].split("/")[0]][item["id"]] = item["correct"]
    return tasks


# --- tables ------------------------------------------------------------------------------------


def _row(name: str, count: Count) -> tuple[str, str, str, str]:
    low, high = wilson(count.right, count.total)
    counted = f"{count.right}/{count.total}"
    return name, counted, f"{count.share:.1%}", f"{low:.1%} - {high:.1%}"


def summary_table(tasks: Mapping[str, Summary]) -> Table:
    table = Table(title="Exact match")
    for name, side in (("", "left"), ("right", "right"), ("accuracy", "right"), ("95%", "right")):
        table.add_column(name, justify="right" if side == "right" else "left")
    for task, summary in tasks.items():
        table.add_section()
        table.add_row(*_row(task, summary.items), style="bold")
        for kind, count in sorted(summary.kinds.items()):
            table.add_row(*_row(f"  {kind}", count))
        if summary.all_fields.total:
            table.add_row(*_row("  all fields", summary.all_fields), style="bold")
            for name, count in sorted(summary.fields.items()):
                table.add_row(*_row(f"    {name}", count))
    return table


def comparison_table(names: tuple[str, str], tasks: Mapping[str, Paired]) -> Table:
    table = Table(title=f"{names[0]} (a) against {names[1]} (b), paired by item")
    table.add_column("")
    for name in ("items", "a right", "b right", "a only", "b only", "McNemar p"):
        table.add_column(name, justify="right")
    for task, paired in tasks.items():
        cells = (paired.items, paired.right_a, paired.right_b, paired.lost, paired.gained)
        table.add_row(task, *map(str, cells), f"{paired.p_value:.4g}")
    return table
