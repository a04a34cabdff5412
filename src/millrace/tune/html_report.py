"""A study as one HTML page, in the benchmark's own form: no scripts, nothing is loaded."""

from __future__ import annotations

from datetime import UTC, datetime

from millrace.bench.report.chart import Series, chart, frontier
from millrace.bench.report.page import (
    Card,
    CardLine,
    Chart,
    Page,
    Section,
    environment,
    figure_text,
    one_chart,
)
from millrace.tune.results import Results, TrialRow
from millrace.tune.text_report import UNITS, draft_cells, figure
from millrace.tune.trials.failures import TITLES
from millrace.version import __version__

_HEADINGS = (
    *("trial", "settings", "{unit}", "short runs", "rounds less spread", "against the defaults"),
    *("accuracy", "what limits", "TPOT / TTFT p99 / ITL p99, ms", "why it was tried"),
)


def report_html(results: Results) -> str:
    """The page of a study."""
    parts = (_best, _drafts, _charts, _trials, _importance, _failures)
    page = Page(
        models=[results.model],
        files=0,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        sections=[section for part in parts if not (section := part(results)).empty],
        cards=_cards(results),
        title=f"Tuning of {results.engine} by {UNITS[results.objective]}",
    )
    return environment().get_template("report.html.j2").render(page=page)


def _cards(results: Results) -> list[Card]:
    """Who won, by how much, how right its answers are, and what the study was."""
    failed = sum(row.failure is not None for row in results.trials)
    hours = f"{failed} failed; {results.seconds / 60:.0f} minutes of visits"
    study = Card("Trials", [CardLine(str(len(results.trials)), hours)])
    found = results.verdict
    if found is None:
        return [study]
    row = results.trials[found.best]
    against = CardLine("not better" if found.best == 0 or not found.clear else "better")
    if found.gain is not None and found.clear:
        line = str(found.gain).partition(" (")
        against = CardLine(line[0], line[2].removesuffix(")"))
    elif found.clear:
        against = CardLine("they fail")
    return [
        Card("Best settings", [CardLine(row.label, f"trial {row.number}")]),
        Card("Against the defaults", [against]),
        Card(f"Its {UNITS[results.objective]}", [CardLine(figure(row.value))]),
        Card("Its accuracy", [CardLine(row.accuracy)]),
        study,
    ]


def _best(results: Results) -> Section:
    found = results.verdict
    if found is None:
        return Section(title="Best settings", warnings=["nothing worked; see the failures"])
    row = results.trials[found.best]
    why = found.why[:1].upper() + found.why[1:]
    notes = [f"{why}.", f"Start it with: {results.command}"]
    if found.tied and found.clear:
        notes.append(f"Not told apart from it: trial {', '.join(map(str, found.tied))}.")
    if row.bottleneck:
        notes.append(f"What limits it: {row.bottleneck}.")
    warnings = [] if results.finished else ["The study has not ended: these are results so far."]
    return Section(title="Best settings", notes=notes, warnings=warnings)


def _drafts(results: Results) -> Section:
    if results.drafts is None:
        return Section(title="Drafts by batch size")
    return Section(
        title="Drafts by batch size",
        introduction=[
            "Total tok/s of the best settings on one engine, by the number of drafts; in brackets "
            "the best, by rounds of runs that took turns."
        ],
        table=[tuple(row) for row in draft_cells(results.drafts.schedule)],
        notes=[f"Start it so with: {results.drafts.command}"],
    )


def _charts(results: Results) -> Section:
    return Section(
        title="How the search went",
        introduction=["A point for each trial that works, on the left with its number."],
        charts=[*_pareto(results), *_progress(results)],
    )


def _pareto(results: Results) -> list[Chart]:
    """Throughput a device against what one user sees."""
    fine = [row for row in results.trials if row.failure is None and row.tpot_ms > 0]
    points = [(1e3 / row.tpot_ms, row.total / row.devices) for row in fine]
    if len(points) < 2:
        return []
    series = [
        Series("trials", points, dots=True, labels=[str(row.number) for row in fine]),
        Series("frontier", frontier(points)),
    ]
    picture = chart(series, x="tok/s a user (1 / TPOT)", y="total tok/s a device")
    return one_chart("Total tok/s a device against tok/s a user", picture)


def _progress(results: Results) -> list[Chart]:
    """How good the best was after so many trials."""
    fine = [(float(row.number), row.short) for row in results.trials if row.short]
    if len(fine) < 2:
        return []
    best = [(x, max(y for at, y in fine if at <= x)) for x, _ in fine]
    series = [Series("trials", fine, dots=True), Series("best so far", best)]
    return one_chart("Short runs", chart(series, x="trial", y="relative to the defaults"))


def _trials(results: Results) -> Section:
    unit = UNITS[results.objective]
    rows = [tuple(heading.format(unit=unit) for heading in _HEADINGS)]
    rows += [_cells(row) for row in results.trials]
    return Section(
        title="What was tried, and why",
        introduction=[
            "Short runs are relative to the defaults at that time. Rounds are the median of full "
            "runs relative to the defaults in the same round, less the spread."
        ],
        table=rows,
    )


def _cells(row: TrialRow) -> tuple[str, ...]:
    return (
        str(row.number),
        row.label,
        figure(row.value),
        f"{row.short:.3f}" if row.short else "",
        f"{row.full:.3f}" if row.full else "",
        row.against.replace(" (", "\n(", 1),
        row.accuracy,
        TITLES[row.failure.kind] if row.failure else row.bottleneck,
        " / ".join(filter(None, map(_ms, (row.tpot_ms, row.ttft_p99_ms, row.itl_p99_ms)))),
        f"{row.source}: {row.why}",
    )


def _ms(value: float) -> str:
    return figure_text(value) if value else ""


def _importance(results: Results) -> Section:
    order = sorted(results.importances.items(), key=lambda pair: -pair[1])
    rows = [("knob", "importance"), *((name, f"{share:.0%}") for name, share in order)]
    return Section(
        title="Which knobs matter",
        introduction=["Shares by PED-ANOVA over the trials that worked."],
        table=rows if order else (),
    )


def _failures(results: Results) -> Section:
    """Trials that failed; of the numbers of drafts that were measured after them, a line each."""
    failed = [(row, row.failure) for row in results.trials if row.failure is not None]
    rows = [("trial", "settings", "failure", "while", "the log's own line")]
    rows += [
        (str(row.number), row.label, TITLES[why.kind], why.phase, why.line) for row, why in failed
    ]
    told = tuple(f"{row.label}, and all" for row, _ in failed)
    notes = [f"Not tried again: {line}" for line in results.no_go if not line.startswith(told)]
    if failed:
        notes.insert(0, "What these trials had is not tried again, and nothing that is riskier.")
    return Section(title="What failed", table=rows if failed else (), notes=notes)
