"""`bench serve` and `bench sweep`: runs with everything around them.

A run here has its progress line, its interrupts, its accuracy, its tables, its files and its exit
status. What is measured, and how, is for `runs.serve`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from millrace.bench.flags.structs import ServeFlags, SweepFlags
from millrace.bench.load.interrupts import InterruptedRunError, Interrupts
from millrace.bench.load.options import BenchOptions
from millrace.bench.report.live import LiveProgress, remarks
from millrace.bench.report.run_report import benchy_table, error_lines, table
from millrace.bench.report.save import check_raw, default_name, new_file, provenance, save_run
from millrace.bench.report.sweep_table import sweep_table
from millrace.bench.runs.accuracy import Accuracy, accuracy_fields, accuracy_under_load
from millrace.bench.runs.options_from_flags import (
    ignored_proxy,
    metadata_fields,
    metric_names,
    serve_options,
    with_run_seed,
)
from millrace.bench.runs.serve import Run, run
from millrace.bench.runs.sweep_grid import Point, point_name
from millrace.errors import UserError

FAILED = 1


def measure_runs(flags: ServeFlags) -> int:
    """All runs of `bench serve`; the exit status is that of the worst one, or of a signal."""
    _check_output(flags)
    options = serve_options(flags)
    _remark_on_proxy(options)
    status = 0
    with Interrupts() as interrupts:
        for number in range(flags.num_runs):
            name = f"run{number + 1}" if flags.num_runs > 1 else ""
            own = with_run_seed(options, number)
            measured = _measure(own, flags, name, interrupts, with_table=True)
            status = max(status, measured[0] if measured else 0)
            if interrupts.number is not None:
                break
    return interrupts.status or status


def measure_sweep(points: Sequence[Point], flags: Sequence[SweepFlags]) -> int:
    """All runs of `bench sweep`. flags: those of each point. Returns the exit status."""
    _check_output(flags[0])
    planned = [serve_options(one) for one in flags]
    _remark_on_proxy(planned[0])
    results: list[dict[str, Any]] = []
    with Interrupts() as interrupts:
        try:
            status = _measure_points(points, planned, flags[0], interrupts, results)
        finally:  # also of what a failure leaves behind
            if results:
                click.echo(sweep_table(results))
                if flags[0].llama_benchy:
                    click.echo(benchy_table(results))
    return interrupts.status or status


def _measure_points(
    points: Sequence[Point],
    planned: Sequence[BenchOptions],
    flags: SweepFlags,
    interrupts: Interrupts,
    results: list[dict[str, Any]],
) -> int:
    """All points, then all again; their fields are added to `results`."""
    status = 0
    for number in range(flags.num_runs):
        for index, (point, options) in enumerate(zip(points, planned, strict=True)):
            if interrupts.number is not None:
                return status
            click.echo(f"{point_name(point)}, run {number + 1} of {flags.num_runs}", err=True)
            name = f"{point_name(point)}-run{number + 1}"
            own = with_run_seed(options, number, index)
            measured = _measure(own, flags, name, interrupts, with_table=False)
            if measured is not None:
                status = max(status, measured[0])
                results.append(measured[1])
    return status


def _remark_on_proxy(options: BenchOptions) -> None:
    if (remark := ignored_proxy(options.target)) is not None:
        click.echo(remark, err=True)


def _check_output(flags: ServeFlags) -> None:
    remark = check_raw(flags.raw)
    if remark and flags.saves:
        click.echo(remark, err=True)
    metric_names(flags.percentile_metrics)
    metadata_fields(flags.metadata)
    if flags.append_result and flags.result_filename is None:
        raise UserError("--append-result needs the file: give --result-filename")
    if flags.num_runs < 1:
        raise UserError(f"--num-runs {flags.num_runs}: use 1 or more")


def _measure(
    options: BenchOptions,
    flags: ServeFlags,
    name: str,
    interrupts: Interrupts,
    *,
    with_table: bool,
) -> tuple[int, dict[str, Any]] | None:
    """One run: its exit status and its fields; None when it was interrupted before it began.

    name: what is added to the names of its files.
    """
    try:
        outcome, accuracy = interrupts.run(lambda stop: _run_with_accuracy(options, flags, stop))
    except InterruptedRunError:
        click.echo("interrupted before the run began: nothing was measured", err=True)
        return None
    fields = {**outcome.fields, "accuracy": accuracy_fields(accuracy)}
    if with_table:
        click.echo(table(fields, metric_names(flags.percentile_metrics), options.percentiles))
        if flags.llama_benchy:
            click.echo(benchy_table([fields]))
    for line in [*error_lines(outcome.records), *remarks(fields)]:
        click.echo(line, err=True)
    if flags.saves:
        _save(outcome, fields, flags, name)
    if outcome.interrupted:
        return 0, fields  # the signal is the status
    problems = verdict(fields, accuracy, flags)
    for problem in problems:
        click.echo(problem, err=True)
    return FAILED if problems else 0, fields


def verdict(
    fields: Mapping[str, Any], accuracy: Mapping[str, Accuracy], flags: ServeFlags
) -> list[str]:
    """What fails a run, a line for each reason; none for a good run."""
    problems = []
    ended = fields["completed"] + fields["failed"]
    share = fields["failed"] / ended if ended else 1.0
    if share > flags.max_failed or not fields["completed"]:
        problems.append(
            f"{fields['failed']} of {ended} requests failed, more than --max-failed "
            f"{flags.max_failed:g}"
        )
    for task, found in accuracy.items():
        if flags.min_accuracy is not None and (found.value or 0.0) < flags.min_accuracy:
            problems.append(f"accuracy on {task}: {found} < --min-accuracy {flags.min_accuracy:g}")
    if flags.refuse_client_bound and fields["client"]["client_bound"]:
        problems.append("refused: the load generator limited this run (it was client-bound)")
    return problems


def _save(outcome: Run, fields: dict[str, Any], flags: ServeFlags, part: str) -> None:
    name = flags.result_filename or default_name(fields)
    if part and not flags.append_result:
        name = f"{name.removesuffix('.json')}-{part}.json"
    path = Path(flags.result_dir) / name
    append = flags.append_result and flags.result_filename is not None
    if flags.result_filename is None:
        path = new_file(path)  # runs of one second have one default name
    metadata = metadata_fields(flags.metadata)
    for taken in metadata.keys() & fields.keys():
        click.echo(f"--metadata {taken} is left out: the file has a figure of that name", err=True)
    fields = {**metadata, **fields, "provenance": provenance(outcome.server_version)}
    paths = save_run(
        path,
        fields,
        outcome.records,
        outcome.observation.samples,
        detailed=flags.save_detailed,
        raw=flags.raw,
        append=append,
    )
    click.echo(f"written to {paths[0]}" + "".join(f", {path.name}" for path in paths[1:]))


async def _run_with_accuracy(
    options: BenchOptions, flags: ServeFlags, stop: asyncio.Event
) -> tuple[Run, dict[str, Accuracy]]:
    """A run and its accuracy. `stop` ends either early and keeps what was measured."""
    progress = LiveProgress(hidden=flags.disable_tqdm, duration=options.duration)
    try:
        outcome = await run(options, stop=stop, on_start=progress.start, on_progress=progress.show)
    finally:
        progress.stop()
    accuracy: dict[str, Accuracy] = {}
    if flags.accuracy and not stop.is_set():
        tasks = [task.strip() for task in flags.accuracy.split(",") if task.strip()]
        click.echo(f"evaluating {', '.join(tasks)} under the same load", err=True)
        accuracy = await accuracy_under_load(options, tasks, flags.accuracy_items, stop)
    return outcome, accuracy
