"""`millrace bench`: options in, tables and files out."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click
import uvloop

from millrace.bench.load.options import BenchOptions
from millrace.bench.report.compare import compare, comparison_table
from millrace.bench.report.html_report import report_page
from millrace.bench.report.live import LiveProgress, remarks
from millrace.bench.report.results import load_results
from millrace.bench.report.run_report import benchy_table, error_lines, table
from millrace.bench.report.save import (
    RawFormat,
    check_raw,
    default_name,
    provenance,
    save_run,
    write_json,
)
from millrace.bench.report.sweep import grid, point_name, sweep_table
from millrace.bench.report.tables import aligned
from millrace.bench.runs.accuracy import Accuracy, accuracy_fields, accuracy_under_load
from millrace.bench.runs.cli_common import (
    FAILED,
    compared_flags,
    compared_options,
    finish,
    tell_step,
)
from millrace.bench.runs.flags import load_flags, metric_names, serve_options, server_flags
from millrace.bench.runs.parallelism import parallelism
from millrace.bench.runs.scaling import measure_scaling, scaling_fields, scaling_table
from millrace.bench.runs.selftest import level_rows, selftest
from millrace.bench.runs.serve import Run, run
from millrace.errors import UserError

INTERRUPTED = 130


@click.group()
def bench() -> None:
    """Measure a server: throughput and latency, with accuracy beside them."""


# --- one server --------------------------------------------------------------------------------

_SERVE_DEFAULTS: dict[str, Any] = {
    "num_prompts": None,
    "input_len": 1024,
    "output_len": 128,
    "range_ratio": 0.0,
    "concurrency": None,
    "ignore_eos": False,
    "warmups": 0,
}


def _output_flags(command: Any) -> Any:
    """What is kept, what else is measured, and what fails a run."""
    flags = [
        click.option("--save-result", is_flag=True, help="Write the figures as JSON."),
        click.option("--save-detailed", is_flag=True, help="Also each request's times in it."),
        click.option("--result-dir", type=click.Path(file_okay=False), default="."),
        click.option("--result-filename", help="Name of the JSON file (default: from the run)."),
        click.option("--raw", type=click.Choice(get_args(RawFormat)), default="auto",
                     help="Raw data beside the JSON file."),
        click.option("--num-runs", type=int, default=1, show_default=True, help="Repeats."),
        click.option("--disable-tqdm", is_flag=True, help="Show no progress."),
        click.option("--accuracy", help="Evaluate too, under the same load, as math,policy."),
        click.option("--accuracy-items", type=int, default=50, show_default=True,
                     help="Items of each task."),
        click.option("--min-accuracy", type=float, help="Exit with 1 when a task is below."),
        click.option("--max-failed", type=float, default=0.05, show_default=True,
                     help="Share of requests that may fail."),
        click.option("--refuse-client-bound", is_flag=True,
                     help="Exit with 1 when the client bounds it."),
        click.option("--llama-benchy", is_flag=True, help="Print llama-benchy's columns too."),
    ]  # fmt: skip
    for flag in reversed(flags):
        command = flag(command)
    return command


@bench.command()
@server_flags()
@_output_flags
@load_flags(**_SERVE_DEFAULTS)
def serve(**flags: Any) -> None:
    """Load a running server and print its figures."""
    _check_output(flags)
    options = serve_options(flags)
    status = 0
    for number in range(flags["num_runs"]):
        name = f"run{number + 1}" if flags["num_runs"] > 1 else ""
        status = max(status, _measure_once(options, flags, name)[0])
        if status == INTERRUPTED:
            break
    _exit(status)


@bench.command()
@server_flags()
@_output_flags
@load_flags(**_SERVE_DEFAULTS)
@click.option("--over", multiple=True, required=True, help="FLAG=V1,V2: measure at each.")
def sweep(**flags: Any) -> None:
    """Load a running server at every point of a grid and print one table.

    `--over max-concurrency=1,8,64` and `--over random-context-len=0,4096,16384` are typical; of
    several, every combination is measured. With --num-runs all points are run, then all again.
    """
    _check_output(flags)
    points = grid(click.get_current_context().command, flags["over"])
    planned = [serve_options({**flags, **point, "over": tuple(point)}) for point in points]
    results, status = [], 0
    for number in range(flags["num_runs"]):
        for point, options in zip(points, planned, strict=True):
            click.echo(f"{point_name(point)}, run {number + 1} of {flags['num_runs']}", err=True)
            name = f"{point_name(point)}-run{number + 1}"
            ended, fields = _measure_once(options, {**flags, "quiet": True}, name)
            results.append(fields)
            status = max(status, ended)
            if ended == INTERRUPTED:
                break
    click.echo(sweep_table(results))
    if flags["llama_benchy"]:
        click.echo(benchy_table(results))
    _exit(status)


def _check_output(flags: Mapping[str, Any]) -> None:
    note = check_raw(flags["raw"])
    if note and (flags["save_result"] or flags["save_detailed"] or flags["result_filename"]):
        click.echo(note, err=True)
    metric_names(flags["percentile_metrics"])
    if flags["num_runs"] < 1:
        raise UserError(f"--num-runs {flags['num_runs']}: use 1 or more")


def _exit(status: int) -> None:
    if status:
        raise click.exceptions.Exit(status)


def _measure_once(
    options: BenchOptions, flags: Mapping[str, Any], name: str
) -> tuple[int, dict[str, Any]]:
    """One run with all that belongs to it: the exit status that it deserves, and its fields.
    name: what is added to the file's name."""
    outcome, accuracy = uvloop.run(_interruptible(options, flags))
    fields = {**outcome.fields, "accuracy": accuracy_fields(accuracy)}
    if not flags.get("quiet"):
        click.echo(table(fields, metric_names(flags["percentile_metrics"]), options.percentiles))
        if flags["llama_benchy"]:
            click.echo(benchy_table([fields]))
    for line in [*error_lines(outcome.records), *remarks(fields)]:
        click.echo(line, err=True)
    if flags["save_result"] or flags["save_detailed"] or flags["result_filename"]:
        _save(outcome, fields, flags, name)
    status = INTERRUPTED if outcome.interrupted else _verdict(fields, accuracy, flags)
    return status, fields


def _verdict(
    fields: Mapping[str, Any], accuracy: Mapping[str, Accuracy], flags: Mapping[str, Any]
) -> int:
    """0, or 1 with a line that says what failed the run."""
    faults = []
    ended = fields["completed"] + fields["failed"]
    share = fields["failed"] / ended if ended else 1.0
    if share > flags["max_failed"] or not fields["completed"]:
        faults.append(
            f"{fields['failed']} of {ended} requests failed, more than --max-failed "
            f"{flags['max_failed']:g}"
        )
    for task, found in accuracy.items():
        if flags["min_accuracy"] is not None and (found.value or 0.0) < flags["min_accuracy"]:
            faults.append(f"accuracy on {task}: {found} < --min-accuracy {flags['min_accuracy']:g}")
    if flags["refuse_client_bound"] and fields["client"]["client_bound"]:
        faults.append("refused: the client bounded this run")
    for fault in faults:
        click.echo(fault, err=True)
    return FAILED if faults else 0


def _save(outcome: Run, fields: dict[str, Any], flags: Mapping[str, Any], part: str) -> None:
    name = flags["result_filename"] or default_name(fields)
    if part:
        name = f"{name.removesuffix('.json')}-{part}.json"
    fields = {**fields, "provenance": provenance(outcome.server_version)}
    paths = save_run(
        Path(flags["result_dir"]) / name,
        fields,
        outcome.records,
        outcome.observation.samples,
        detailed=flags["save_detailed"],
        raw=flags["raw"],
    )
    click.echo(f"written to {paths[0]}" + "".join(f", {path.name}" for path in paths[1:]))


async def _interruptible(
    options: BenchOptions, flags: Mapping[str, Any]
) -> tuple[Run, dict[str, Accuracy]]:
    """The run and its accuracy; SIGINT ends it with what was measured, a second one ends the
    process."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    progress = LiveProgress(hidden=flags.get("disable_tqdm", False), duration=options.duration)

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        outcome = await run(options, stop=stop, on_start=progress.start, on_progress=progress.show)
    finally:
        progress.stop()
    accuracy: dict[str, Accuracy] = {}
    if flags.get("accuracy") and not stop.is_set():
        tasks = [task.strip() for task in flags["accuracy"].split(",") if task.strip()]
        click.echo(f"evaluating {', '.join(tasks)} under the same load", err=True)
        accuracy = await accuracy_under_load(options, tasks, flags["accuracy_items"], stop)
    return outcome, accuracy


# --- results -----------------------------------------------------------------------------------


@bench.command("compare")
@click.argument("a")
@click.argument("b")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write it here too.")
def compare_command(a: str, b: str, json_path: str | None) -> None:
    """Ratios of B to A with 95% intervals; A and B are result files, or directories of repeats."""
    comparisons = compare(load_results(a), load_results(b))
    click.echo("\n\n".join(comparison_table(one) for one in comparisons))
    if min(n for one in comparisons for n in one.runs) < 2:
        click.echo("an interval needs two runs or more of each: use --num-runs 5", err=True)
    if json_path:
        click.echo(f"written to {write_json(Path(json_path), comparisons)}")


@bench.command("report")
@click.argument("directory")
@click.option("--output", help="The HTML file [report.html in the directory].")
def report_command(directory: str, output: str | None) -> None:
    """Make one HTML file, self-contained, of the results in DIRECTORY."""
    results = load_results(directory)
    place = Path(directory) if Path(directory).is_dir() else Path(directory).parent
    path = Path(output) if output else place / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report_page(results), encoding="utf-8")
    click.echo(f"written to {path}")


# --- the generator itself ----------------------------------------------------------------------


@bench.command("selftest")
@click.option("--streams", default="16,64,256,1024", show_default=True, help="Levels.")
@click.option("--processes", type=int, default=1, show_default=True, help="That send.")
@click.option("--seconds", type=float, default=5.0, show_default=True, help="A level.")
@click.option("--chat", is_flag=True, help="Chat completions instead of completions.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the levels here.")
def selftest_command(**flags: Any) -> None:
    """Hold the generator against a mock that stamps what it sends; print its error.

    The exit status is 1 when an error is beyond 2% at the median or 5% at the 99th percentile.
    """
    if flags["processes"] < 1 or not flags["seconds"] > 0:
        raise UserError("--processes and --seconds: use numbers above 0")
    streams = _counts(flags["streams"], "--streams")
    levels = uvloop.run(
        selftest(
            streams,
            processes=flags["processes"],
            seconds=flags["seconds"],
            chat=flags["chat"],
            on_level=lambda level: click.echo(f"{level.streams} streams measured", err=True),
        )
    )
    click.echo("\n".join(aligned(level_rows(levels))))
    for level in levels:
        if level.client["client_bound"]:
            click.echo(f"{level.streams} streams: {level.client['advice']}", err=True)
    if flags["json_path"]:
        path = Path(flags["json_path"])
        click.echo(f"written to {write_json(path, {'levels': levels, **provenance()})}")
    if not all(level.within for level in levels):
        raise click.exceptions.Exit(FAILED)


# --- replicas ----------------------------------------------------------------------------------


@bench.command()
@click.option("--replicas", default="1,2,3", show_default=True, help="Counts to compare.")
@compared_flags
def scaling(**flags: Any) -> None:
    """Serve MODEL on 1, 2 and 3 replicas and print how throughput grows, accuracy beside it.

    What stands behind `--` goes to `millrace serve` as it is.
    """
    options = compared_options(flags, _counts(flags["replicas"], "--replicas"))
    rows = uvloop.run(measure_scaling(options, tell_step))
    click.echo(scaling_table(rows))
    finish("scaling", flags, options, rows, scaling_fields(rows))


bench.add_command(parallelism)


def _counts(text: str, flag: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UserError(f"{flag} {text!r}: use counts from 1 on, as 1,2,3")
    return counts
