"""`bench compare` and `bench report`: what is made of result files."""

from __future__ import annotations

from pathlib import Path

import click

from millrace.bench.flags.structs import CompareFlags, ReportFlags
from millrace.bench.report.compare import compare, comparison_table
from millrace.bench.report.html_report import report_page
from millrace.bench.report.results import load_results
from millrace.bench.report.save import write_json


def compare_results(a: str, b: str, flags: CompareFlags) -> None:
    """Print the comparison of two sets of results, and write it where the flags say."""
    comparisons = compare(load_results(a), load_results(b))
    click.echo("\n\n".join(comparison_table(one) for one in comparisons))
    if min(count for one in comparisons for count in one.runs) < 2:
        click.echo("an interval needs two runs or more of each: use --num-runs 5", err=True)
    if flags.json:
        click.echo(f"written to {write_json(Path(flags.json), comparisons)}")


def write_report(directory: str, flags: ReportFlags) -> None:
    """Write the HTML report of a directory's results, or of one result file."""
    results = load_results(directory)
    folder = Path(directory) if Path(directory).is_dir() else Path(directory).parent
    path = Path(flags.output) if flags.output else folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report_page(results), encoding="utf-8")
    click.echo(f"written to {path}")
