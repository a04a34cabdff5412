"""`bench compare` and `bench report`: what is made of result files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from millrace.bench.flags.structs import CompareFlags, ReportFlags
from millrace.bench.report.compare import (
    compare,
    comparison_table,
    differing_lines,
    too_few,
    unmatched,
)
from millrace.bench.report.html_report import report_page
from millrace.bench.report.results import load_results
from millrace.bench.report.save import write_json
from millrace.bench.runs.options_from_flags import read_objectives


def compare_results(a: str, b: str, flags: CompareFlags) -> None:
    """Print the comparison of two sets of results, and write it where the flags say."""
    of_a, of_b = load_results(a), load_results(b)
    comparisons = compare(of_a, of_b)
    if (few := too_few(comparisons)) is not None:
        click.echo(f"{few}\n")
    for line in [*differing_lines(comparisons), *unmatched(of_a, of_b)]:
        click.echo(line)
    for one in comparisons:
        click.echo(f"\n{comparison_table(one)}")
    if flags.json:
        click.echo(f"written to {write_json(Path(flags.json), comparisons)}")


def write_report(places: Sequence[str], flags: ReportFlags) -> None:
    """Write the HTML report of one directory of results (or one file), or of two, A and B."""
    results, others = load_results(places[0]), load_results(places[1]) if places[1:] else []
    page = report_page(results, others, read_objectives(flags.goodput))
    last = Path(places[-1])
    folder = last if last.is_dir() else last.parent
    path = Path(flags.output) if flags.output else folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    click.echo(f"written to {path}")
