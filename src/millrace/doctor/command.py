"""The options of `millrace doctor`: what is checked, and where the report goes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from millrace.common.flags import given, struct_options
from millrace.config import HELP, EngineArgs, engine_args
from millrace.errors import ConfigError

if TYPE_CHECKING:
    from millrace.doctor.finding import Finding


@click.command()
@click.argument("model", required=False)
@click.option(
    "--collectives",
    is_flag=True,
    help="Measure the all-reduces of tensor-parallel ranks, and their share of a decoding step.",
)
@click.option(
    "--hosts",
    is_flag=True,
    help="Compare the hosts that torchrun starts this on, and measure an all-reduce between them.",
)
@click.option(
    "--json", "file", type=click.Path(allow_dash=True, path_type=Path),
    help="Also write the report to this file, as JSON; - writes JSON to stdout instead of text.",
)  # fmt: skip
@click.option("--host", default="127.0.0.1", help="Address that a server would listen on.")
@click.option("--port", default=8000, help="Port that a server would listen on.")
@struct_options(EngineArgs, HELP, skip=frozenset({"model"}))
@click.pass_context
def doctor(
    ctx: click.Context,
    /,
    model: str | None,
    collectives: bool,
    hosts: bool,
    file: Path | None,
    host: str,
    port: int,
    **values: Any,
) -> None:
    """Check this machine, and whether it can serve MODEL under the options of `serve`.

    The exit status is 1 if something prevents a server from working.
    """
    args = engine_args(model=model or "", **given(values, EngineArgs))
    logging.basicConfig(level=logging.WARNING, format="%(name)s %(message)s")
    if hosts:
        ctx.exit(_compare_hosts(file))
    elif collectives:
        if model is None:
            raise ConfigError("--collectives needs a MODEL to measure with")
        _measure_allreduce(args, file)
    else:
        ctx.exit(_check(args, host, port, file))


def _check(args: EngineArgs, host: str, port: int, file: Path | None) -> int:
    from millrace.doctor import devices, machine, model, network, packages
    from millrace.doctor import host as of_host

    findings = [
        *machine.versions(),
        *machine.machine(),
        *of_host.memory_nodes(),
        *machine.limits(host, port),
        *of_host.outgoing(port),
        *of_host.containers(),
        *network.network(),
        *packages.packages(devices.has_hopper()),
        *devices.devices(),
        *devices.kernels(),
        *model.shipped(),
        *(model.model(args) if args.model else ()),
    ]
    return _report(findings, file)


def _compare_hosts(file: Path | None) -> int:
    from millrace.doctor.hosts import examine

    findings = examine()
    return 0 if findings is None else _report(findings, file)


def _report(findings: Sequence[Finding], file: Path | None) -> int:
    """Print and write the findings; the exit status."""
    from rich.console import Console

    from millrace.doctor.finding import show, write_report

    ok = all(one.verdict != "fail" for one in findings)
    if str(file) != "-":
        show(findings, Console(highlight=False))
    write_report({"ok": ok, "findings": findings}, file)
    return 0 if ok else 1


def _measure_allreduce(args: EngineArgs, file: Path | None) -> None:
    from millrace.doctor.allreduce import measure, report
    from millrace.doctor.finding import write_report

    found = measure(args)
    if str(file) != "-":
        click.echo(report(found))
    write_report(found, file)
