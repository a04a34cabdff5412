"""The commands of `millrace bench`: their flags, and the function that runs each.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from millrace.bench.flags.command_line import SeveralValues, flags_of, read_flags
from millrace.bench.flags.structs import (
    CompareFlags,
    GatewayFlags,
    OwnServersFlags,
    ParallelismFlags,
    ReportFlags,
    ScalingFlags,
    SelftestFlags,
    ServeFlags,
    SweepFlags,
)

_Command = TypeVar("_Command", bound=Callable[..., Any])


@click.group()
def bench() -> None:
    """Measure servers: throughput, latency and, beside them, accuracy."""


@bench.command(cls=SeveralValues)
@flags_of(ServeFlags)
def serve(**values: Any) -> None:
    """Load a running server and print its figures."""
    from millrace.bench.runs.reported_run import measure_runs

    _exit(measure_runs(read_flags(ServeFlags, values)))


@bench.command(cls=SeveralValues)
@flags_of(SweepFlags)
@click.pass_context
def sweep(context: click.Context, /, **values: Any) -> None:
    """Load a running server at every point of a grid and print one table.

    `--over max-concurrency=1,8,64` and `--over random-context-len=0,4096,16384` are typical; of
    several, every combination is measured. With --num-runs all points are run, then all again.
    """
    from millrace.bench.runs.reported_run import measure_sweep
    from millrace.bench.runs.sweep_grid import grid

    points = grid(context.command, values["over"])
    flags = [read_flags(SweepFlags, {**values, **point}) for point in points]
    _exit(measure_sweep(points, flags))


@bench.command()
@click.argument("a")
@click.argument("b")
@flags_of(CompareFlags)
def compare(a: str, b: str, **values: Any) -> None:
    """Ratios of B to A with 95% intervals; A and B are result files, or directories of repeats."""
    from millrace.bench.runs.results_commands import compare_results

    compare_results(a, b, read_flags(CompareFlags, values))


@bench.command(cls=SeveralValues)
@click.argument("directory")
@click.argument("other", required=False)
@flags_of(ReportFlags)
def report(directory: str, other: str | None, **values: Any) -> None:
    """Make one self-contained HTML file of the results in DIRECTORY; with OTHER, of both: what was
    measured before and after a change."""
    from millrace.bench.runs.results_commands import write_report

    write_report([directory, *([other] if other else [])], read_flags(ReportFlags, values))


@bench.command()
@flags_of(SelftestFlags)
def selftest(**values: Any) -> None:
    """Measure the error of the load generator against a mock server that stamps what it sends.

    The exit status is 1 when an error is beyond 2% at the median or 5% at the 99th percentile.
    """
    from millrace.bench.runs.selftest import run_selftest

    _exit(run_selftest(read_flags(SelftestFlags, values)))


def _own_servers(
    kind: type[OwnServersFlags], *, model: bool = True
) -> Callable[[_Command], _Command]:
    """Decorator: a command that starts servers of MODEL, with further arguments for them. model:
    whether one must be given."""

    def decorate(command: _Command) -> _Command:
        command = flags_of(kind)(command)
        command = click.argument("serve_arguments", nargs=-1, type=click.UNPROCESSED)(command)
        return click.argument("model", required=model)(command)

    return decorate


@bench.command()
@_own_servers(ScalingFlags)
def scaling(model: str, serve_arguments: tuple[str, ...], **values: Any) -> None:
    """Serve MODEL on 1, 2 and 3 replicas and print how throughput grows, accuracy beside it.

    All arguments after `--` are passed on to `millrace serve`.
    """
    from millrace.bench.runs.own_servers import run_scaling

    _exit(run_scaling(model, serve_arguments, read_flags(ScalingFlags, values)))


@bench.command()
@_own_servers(ParallelismFlags)
def parallelism(model: str, serve_arguments: tuple[str, ...], **values: Any) -> None:
    """Serve MODEL in every arrangement of tensor parallelism and replicas that this host can hold.

    One table: throughput in total and for one user, latencies, accuracy. All arguments after `--`
    are passed on to `millrace serve`.
    """
    from millrace.bench.runs.own_servers import run_parallelism

    _exit(run_parallelism(model, serve_arguments, read_flags(ParallelismFlags, values)))


@bench.command()
@_own_servers(GatewayFlags, model=False)
def gateway(model: str | None, serve_arguments: tuple[str, ...], **values: Any) -> None:
    """Load the replicas of MODEL directly and through a gateway: what the gateway costs.

    One table: throughput of both, the share that is lost, latencies, accuracy. --num-prompts and
    --max-concurrency are for each replica. Instead of MODEL, --url names a gateway that runs. All
    arguments after `--` are passed on to `millrace serve`.
    """
    from millrace.bench.runs.own_servers import run_gateway

    _exit(run_gateway(model, serve_arguments, read_flags(GatewayFlags, values)))


def _exit(status: int) -> None:
    if status:
        raise click.exceptions.Exit(status)
