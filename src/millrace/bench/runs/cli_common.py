"""What commands that compare servers of their own have in common: their flags, and how they end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from millrace.bench.report.save import provenance, write_json
from millrace.bench.runs.flags import load_flags, load_options
from millrace.bench.runs.scaling import ScalingOptions, ScalingRow
from millrace.bench.workload.prompts import lengths, maker, workload_line
from millrace.common.http_client import Target
from millrace.fleet.device_assignment import visible_gpus

FAILED = 1


def compared_flags(command: Any) -> Any:
    """The model, what goes to its servers, the load (of a size for a laptop), the result file."""
    flags = [
        click.argument("model"),
        click.argument("serve_arguments", nargs=-1, type=click.UNPROCESSED),
        click.option("--repeats", type=int, default=1, show_default=True,
                     help="Interleaved; medians."),
        click.option("--accuracy-task", default="math", show_default=True),
        click.option("--accuracy-items", type=int, default=50, show_default=True,
                     help="0 for no check."),
        click.option("--start-timeout", type=float, default=900.0,
                     help="Seconds for a server to start."),
        click.option("--result-dir", type=click.Path(file_okay=False), default="bench-results"),
        click.option("--result-filename", help="Name of the JSON file (default: from the run)."),
        load_flags(
            num_prompts=64,
            input_len=128,
            output_len=64,
            range_ratio=0.5,
            concurrency=16,
            ignore_eos=True,
            warmups=16,
        ),
    ]  # fmt: skip
    for flag in reversed(flags):
        command = flag(command)
    return command


def compared_options(flags: dict[str, Any], counts: Sequence[int]) -> ScalingOptions:
    """What the flags ask for; says on stderr which workload that is."""
    options = ScalingOptions(
        model=flags["model"],
        counts=counts,
        load=load_options(flags, Target("127.0.0.1", 0)),
        serve_arguments=flags["serve_arguments"],
        repeats=flags["repeats"],
        accuracy_task=flags["accuracy_task"],
        accuracy_items=flags["accuracy_items"],
        start_timeout=flags["start_timeout"],
    )
    spec = options.load.workload
    make = maker(spec, as_text=options.load.as_text)
    drawn = lengths([make(index) for index in range(spec.count or 0)])
    click.echo(workload_line(spec, drawn), err=True)
    return options


def tell_step(step: str) -> None:
    """Say what is about to happen."""
    click.echo(step, err=True)


def finish(
    kind: str,
    flags: dict[str, Any],
    options: ScalingOptions,
    rows: Sequence[ScalingRow],
    table: list[dict[str, Any]],
) -> None:
    """Write the result file. The command fails when a request has."""
    date = next(row.runs[0]["date"] for row in rows if row.runs)
    report = {
        "date": date,
        "model": options.model,
        "serve_arguments": options.serve_arguments,
        "cores": len(os.sched_getaffinity(0)),
        "gpus": len(visible_gpus()),
        "provenance": provenance(),
        "table": table,
        "rows": rows,
    }
    path = Path(flags["result_dir"]) / (flags["result_filename"] or f"{kind}-{date}.json")
    click.echo(f"written to {write_json(path, report)}")
    if any(run["failed"] for row in rows for run in row.runs):
        raise click.exceptions.Exit(FAILED)
