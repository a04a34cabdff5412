"""`bench scaling`, `parallelism` and `gateway`: from flags to a table and a result file.

The commands start servers of their own and compare them under one load.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from millrace.bench.flags.structs import (
    GatewayFlags,
    OwnServersFlags,
    ParallelismFlags,
    ScalingFlags,
)
from millrace.bench.load.interrupts import Interrupts
from millrace.bench.report.save import new_file, provenance, write_json
from millrace.bench.runs.gateway_cost import gateway_fields, gateway_table, measure_gateway
from millrace.bench.runs.options_from_flags import load_options, positive_counts
from millrace.bench.runs.parallelism import (
    MOST_CORES,
    measure_parallelism,
    parallelism_fields,
    parallelism_table,
    read_arrangements,
)
from millrace.bench.runs.scaling import (
    ScalingOptions,
    ScalingRow,
    measure_scaling,
    scaling_fields,
    scaling_table,
)
from millrace.bench.workload.prompts import lengths, prompt_maker, workload_line
from millrace.common.http_client import Target
from millrace.errors import UserError
from millrace.fleet.device_assignment import usable_cores, visible_gpus

FAILED = 1


def run_scaling(model: str, serve_arguments: Sequence[str], flags: ScalingFlags) -> int:
    """Measure every count of replicas; the exit status."""
    status = 0
    counts = positive_counts(flags.replicas, "--replicas")
    options = _options(model, serve_arguments, flags, counts)
    with Interrupts() as interrupts:
        found = interrupts.run(lambda stop: measure_scaling(options, _say, stop))
        rows = [row for row in found if row.runs]
        if rows:
            click.echo(scaling_table(rows))
            status = _save("scaling", flags, options, rows, scaling_fields(rows))
    return interrupts.status or status


def run_parallelism(model: str, serve_arguments: Sequence[str], flags: ParallelismFlags) -> int:
    """Measure every arrangement of ranks and replicas; the exit status."""
    status = 0
    devices = len(visible_gpus()) or min(usable_cores(), MOST_CORES)
    arrangements = read_arrangements(flags.arrangements, devices)
    options = _options(model, serve_arguments, flags, counts=[1])
    with Interrupts() as interrupts:
        rows = interrupts.run(lambda stop: measure_parallelism(options, arrangements, _say, stop))
        if any(row.runs for row in rows):
            click.echo(parallelism_table(rows))
            status = _save("parallelism", flags, options, rows, parallelism_fields(rows))
    return interrupts.status or status


def run_gateway(model: str | None, serve_arguments: Sequence[str], flags: GatewayFlags) -> int:
    """Measure replicas with and without a gateway; the exit status."""
    if (model is None) == (flags.url is None):
        raise UserError("give a MODEL to serve, or --url for a gateway that runs; one of both")
    status = 0
    counts = positive_counts(flags.replicas, "--replicas")
    options = _options(model or "", serve_arguments, flags, counts)
    with Interrupts() as interrupts:
        rows = interrupts.run(lambda stop: measure_gateway(options, _say, stop, flags.url))
        if rows:
            click.echo(gateway_table(rows))
            status = _save("gateway", flags, options, rows, gateway_fields(rows))
    return interrupts.status or status


def _options(
    model: str, serve_arguments: Sequence[str], flags: OwnServersFlags, counts: Sequence[int]
) -> ScalingOptions:
    """What the flags ask for; says on stderr which workload that is."""
    options = ScalingOptions(
        model=model,
        counts=counts,
        load=load_options(flags, Target("127.0.0.1", 0)),
        serve_arguments=serve_arguments,
        repeats=flags.repeats,
        accuracy_task=flags.accuracy_task,
        accuracy_items=flags.accuracy_items,
        start_timeout=flags.start_timeout,
    )
    spec = options.load.workload
    make = prompt_maker(spec, as_text=options.load.as_text)
    _say(workload_line(spec, lengths([make(index) for index in range(spec.count or 0)])))
    return options


def _say(line: str) -> None:
    click.echo(line, err=True)


def _save(
    kind: str,
    flags: OwnServersFlags,
    options: ScalingOptions,
    rows: Sequence[ScalingRow],
    table: list[dict[str, Any]],
) -> int:
    """Write the result file. The exit status is 1 when a request failed."""
    date = next(row.runs[0]["date"] for row in rows if row.runs)
    content = {
        "date": date,
        "model": options.model,
        "serve_arguments": options.serve_arguments,
        "cores": len(os.sched_getaffinity(0)),
        "gpus": len(visible_gpus()),
        "provenance": provenance(),
        "table": table,
        "rows": rows,
    }
    path = Path(flags.result_dir) / (flags.result_filename or f"{kind}-{date}.json")
    if flags.result_filename is None:
        path = new_file(path)
    click.echo(f"written to {write_json(path, content)}")
    return FAILED if any(run["failed"] for row in rows for run in row.every_run) else 0
