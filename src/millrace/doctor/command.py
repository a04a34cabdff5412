"""`millrace doctor`: which look at the machine is wanted, and where its report goes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click
import msgspec

from millrace.common.flags import given, struct_options
from millrace.config import HELP, EngineArgs, engine_args
from millrace.errors import ConfigError


@click.command()
@click.argument("model", required=False)
@click.option(
    "--collectives",
    is_flag=True,
    help="Measure the sums over tensor-parallel ranks, and what share of a step they take.",
)
@click.option(
    "--json", "file", type=click.Path(allow_dash=True, path_type=Path),
    help="Also write the report to this file, as JSON; - writes it to stdout instead of the text.",
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
    file: Path | None,
    host: str,
    port: int,
    **values: Any,
) -> None:
    """Look at this machine, and at what it would do with MODEL under the options of `serve`.

    The exit status is 1 if something keeps a server from working.
    """
    args = engine_args(model=model or "", **given(values, EngineArgs))
    logging.basicConfig(level=logging.WARNING, format="%(name)s %(message)s")
    if collectives:
        if model is None:
            raise ConfigError("--collectives needs a MODEL to measure with")
        _collectives(args, file)
    else:
        ctx.exit(_look(args, host, port, file))


def _look(args: EngineArgs, host: str, port: int, file: Path | None) -> int:
    from rich.console import Console

    from millrace.doctor import devices, machine, model, packages
    from millrace.doctor.finding import show

    findings = [
        *machine.versions(),
        *machine.machine(),
        *machine.limits(host, port),
        *packages.packages(devices.has_hopper()),
        *devices.devices(),
        *devices.kernels(),
        *model.shipped(),
        *(model.model(args) if args.model else ()),
    ]
    ok = all(one.verdict != "fail" for one in findings)
    if str(file) != "-":
        show(findings, Console(highlight=False))
    _write({"ok": ok, "findings": findings}, file)
    return 0 if ok else 1


def _collectives(args: EngineArgs, file: Path | None) -> None:
    from millrace.doctor.allreduce import examine, report

    found = examine(args)
    if str(file) != "-":
        click.echo(report(found))
    _write(found, file)


def _write(found: dict[str, Any], file: Path | None) -> None:
    if file is None:
        return
    text = msgspec.json.format(msgspec.json.encode(found))
    if str(file) == "-":
        click.echo(text.decode())
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text)
