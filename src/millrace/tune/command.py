"""`millrace tune`: the settings that serve a load best, found by trials on real servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from millrace.bench.flags.command_line import read_flags
from millrace.common.flags import struct_options
from millrace.tune.kernels import HELP as KERNEL_HELP
from millrace.tune.kernels import KernelFlags
from millrace.tune.options import HELP, TuneFlags

NAMED = "run"  # the command that `millrace tune MODEL` is short for
_DIR = click.argument("directory", type=click.Path(path_type=Path, file_okay=False))


class _Tune(click.Group):
    """`millrace tune MODEL ...` is `millrace tune run MODEL ...`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = [NAMED, *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Tune)
def tune() -> None:
    """Find the settings that serve a load best: `millrace tune MODEL --max-concurrency 64`."""


@tune.command(NAMED)
@click.argument("model")
@click.argument("serve_arguments", nargs=-1, type=click.UNPROCESSED)
@struct_options(TuneFlags, HELP)
def run_command(model: str, serve_arguments: tuple[str, ...], **values: Any) -> None:
    """Try settings of a server of MODEL until the best are found and told apart.

    Nothing is lost when it is killed: `millrace tune resume DIR` goes on. All arguments after `--`
    are passed on to every start of the server.
    """
    from millrace.tune.request import of_command_line
    from millrace.tune.run import begin

    flags = read_flags(TuneFlags, values)
    _exit(begin(of_command_line(model, serve_arguments, flags)))


@tune.command()
@_DIR
def resume(directory: Path) -> None:
    """Go on with the study in DIRECTORY, wherever it was ended."""
    from millrace.tune.run import go_on

    _exit(go_on(directory))


@tune.command()
@_DIR
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(directory: Path, as_json: bool) -> None:
    """Show what the study in DIRECTORY found so far, also while it runs."""
    from millrace.tune.run import shown

    click.echo(shown(directory, as_json=as_json))


@tune.command("write-up")
@click.argument("model", default="qwen3.5-27b")
@click.argument("serve_arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--plan-only", is_flag=True, help="Ask the planner, and start nothing.")
@struct_options(TuneFlags, HELP)
def write_up_command(
    model: str, serve_arguments: tuple[str, ...], plan_only: bool, **values: Any
) -> None:
    """Walk the write-up's four phases on the GPUs that are there, its figures beside ours.

    With --plan-only nothing is started: the planner says what --gpus of --plan-gpu would do (8 of
    b200 by default).
    """
    from millrace.tune.request import Request, of_command_line
    from millrace.tune.run import begin

    flags = read_flags(TuneFlags, {**values, "preset": values.get("preset") or "write-up"})
    if plan_only:
        click.echo(_planned(flags))
        return
    request: Request = of_command_line(model, serve_arguments, flags)
    _exit(begin(msgspec.structs.replace(request, walk="write-up")))


@tune.command("kernels")
@click.argument("model")
@struct_options(KernelFlags, KERNEL_HELP)
def kernels_command(model: str, **values: Any) -> None:
    """Measure which ways of the GPU's kernels are fastest for MODEL's shapes.

    `millrace serve` takes them from then on; without a table a rule is used, and its start says so.
    No weights are read: a config.json is enough. On an H200 it takes some minutes.
    """
    from millrace.tune.kernels import measure

    _exit(measure(model, read_flags(KernelFlags, values)))


def _planned(flags: TuneFlags) -> str:
    from millrace.bench.report.tables import aligned
    from millrace.tune.flag_checks import check_plan_only
    from millrace.tune.write_up import NODE, planned, planned_table

    check_plan_only(flags)
    gpu, count = flags.plan_gpu or "b200", flags.gpus or NODE
    rows = planned(gpu, count, flags.engine)
    lines = aligned(planned_table(rows, gpu, count, flags.engine))
    lines.append("predicted, not measured; accuracy is measured where the phases are run")
    return "\n".join(lines)


def _exit(status: int) -> None:
    if status:
        raise click.exceptions.Exit(status)
