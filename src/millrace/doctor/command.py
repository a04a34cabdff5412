"""`millrace doctor`: which look at the machine is wanted, and where its report goes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click
import msgspec

from millrace.config import HELP, EngineArgs, engine_args
from millrace.errors import ConfigError
from millrace.flags import given, struct_options


@click.command()
@click.argument("model")
@click.option(
    "--collectives",
    is_flag=True,
    help="Measure the sums over tensor-parallel ranks, and what share of a step they take.",
)
@click.option("--json", "file", type=Path, help="Also write the report to this file, as JSON.")
@struct_options(EngineArgs, HELP, skip=frozenset({"model"}))
def doctor(model: str, collectives: bool, file: Path | None, **values: Any) -> None:
    """Look at what this machine does with MODEL, started with the options of `serve`."""
    args = engine_args(model=model, **given(values, EngineArgs))
    if not collectives:
        raise ConfigError("say what to look at: --collectives")
    logging.basicConfig(level=logging.WARNING, format="%(name)s %(message)s")
    from millrace.doctor.collectives import examine, report

    found = examine(args)
    click.echo(report(found))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
