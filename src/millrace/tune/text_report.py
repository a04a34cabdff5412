"""A study in the terminal: a table of trials, who won, and how to start that."""

from __future__ import annotations

from millrace.bench.report.tables import aligned
from millrace.tune.results import Results, TrialRow
from millrace.tune.search.draft_schedule import DraftSchedule
from millrace.tune.trials.failures import TITLES
from millrace.tune.trials.outcome import Outcome, Visit
from millrace.tune.write_up import NODE, phase_named

UNITS = {
    "throughput": "tok/s",
    "per_gpu": "tok/s a GPU",
    "per_dollar": "tokens a dollar",
    "goodput": "good requests/s",
}
_LONGEST = 76  # characters of settings in the table; JSON and the page have all
_HEADINGS = ["trial", "settings", "by", "{unit}", "short runs", "in rounds", "accuracy", "failure"]


def text_of(results: Results) -> str:
    """The whole report as text."""
    unit = UNITS[results.objective]
    cells = [[heading.format(unit=unit) for heading in _HEADINGS]]
    cells += [_cells(row) for row in results.trials]
    lines = aligned(cells)
    lines += _failures(results)
    lines += _phases(results)
    lines += _verdict(results)
    lines += _drafts(results)
    return "\n".join(lines)


def _cells(row: TrialRow) -> list[str]:
    return [
        str(row.number),
        row.label if len(row.label) <= _LONGEST else f"{row.label[: _LONGEST - 4]} ...",
        row.source,
        figure(row.value),
        f"x {row.short:.3f}" if row.short else "",
        f"x {row.full:.3f}" if row.full else "",
        row.accuracy,
        TITLES[row.failure.kind] if row.failure else "",
    ]


def figure(value: float) -> str:
    """A figure with four digits or more; empty for none."""
    return "" if not value else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _failures(results: Results) -> list[str]:
    failed = [row for row in results.trials if row.failure]
    return [f"trial {row.number}: {row.failure}" for row in failed]


def _phases(results: Results) -> list[str]:
    """The write-up's table, where its phases were walked."""
    cells = [["phase", "here, tok/s", "accuracy", "the write-up for as many GPUs", "ratio", ""]]
    for row in results.trials:
        phase = phase_named(row.why)
        if phase is not None:
            there = phase.total * row.devices / NODE
            ratio = f"{row.total / there:.2f}" if row.total else ""
            said = f"there: {phase.note}" if phase.note else ""
            cells.append(
                [phase.name, f"{row.total:,.0f}", row.accuracy, f"{there:,.0f}", ratio, said]
            )
    return aligned(cells) if len(cells) > 1 else []


def _verdict(results: Results) -> list[str]:
    found = results.verdict
    if found is None:
        if not results.finished or not results.trials:
            return ["nothing has worked so far"]
        return [f"nothing worked; the last failure: {results.trials[-1].failure}"]
    state = "" if results.finished else "so far: "
    label = results.trials[found.best].label
    lines = [f"{state}trial {found.best} is best ({label}): {found.why}"]
    if found.tied and found.clear:
        tied = ", ".join(map(str, found.tied))
        lines.append(f"not told apart from it: trial {tied}")
    limiting = results.trials[found.best].bottleneck
    if limiting:
        lines.append(f"what limits it: {limiting}")
    return [*lines, f"start it with: {results.command}"]


def _drafts(results: Results) -> list[str]:
    """The schedule of drafts and the figures that it follows from."""
    if results.drafts is None:
        return []
    return [
        "drafts by batch size, tok/s; the best in brackets:",
        *aligned(draft_cells(results.drafts.schedule)),
        f"start it so with: {results.drafts.command}",
    ]


def draft_cells(schedule: DraftSchedule) -> list[list[str]]:
    """A table of speeds, by requests in flight and drafts; the first row has the headings."""
    depths = list(schedule.rows[0].speeds)
    cells = [["in flight", *(f"{depth} drafts" for depth in depths)]]
    for row in schedule.rows:
        figures = {depth: f"{speed:,.0f}" for depth, speed in row.speeds.items()}
        figures[row.best] = f"[{figures[row.best]}]"
        cells.append([str(row.batch), *figures.values()])
    return cells


def visit_line(visit: Visit, name: str, outcome: Outcome | None, unit: str, value: float) -> str:
    """One line for the terminal, before a visit or after it."""
    kind = f"round {visit.round}" if visit.purpose == "full" else visit.purpose
    head = f"trial {visit.trial} ({kind}): {name}"
    if outcome is None:
        return f"{head} ... {visit.why}"
    if outcome.failure is not None:
        return f"  {outcome.failure}, {outcome.seconds:.0f} s"
    if visit.streams:
        speeds = ", ".join(f"{run.total:,.0f}" for run in outcome.runs)
        return f"  {speeds} tok/s, {outcome.seconds:.0f} s"
    reading = next((run.why for run in outcome.runs if run.why), "")
    return f"  {figure(value)} {unit}, {outcome.seconds:.0f} s" + (
        f"; {reading}" if reading else ""
    )
