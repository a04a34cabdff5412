"""`millrace bench throughput` and `millrace bench latency`, and the group with all of `bench`.

The other commands of `bench` know replicas by HTTP alone; these two load a model themselves.
"""

from __future__ import annotations

from typing import Any

import click
import msgspec

from millrace.bench.command import bench
from millrace.common.flags import given, struct_options
from millrace.config import HELP, EngineArgs
from millrace.offline.options import OFFLINE_HELP, LatencyOptions, ThroughputOptions
from millrace.server.vllm_arguments import Options, rewrite


class EngineCommand(click.Command):
    """A command that takes vLLM's command lines, as `serve` does; the model also as --model."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        arguments, notes = rewrite(args, Options.of(self))
        if notes:
            click.echo(f"{ctx.command_path}: without effect: {'; '.join(notes)}", err=True)
        return super().parse_args(ctx, arguments)


@bench.command(cls=EngineCommand)
@click.argument("model")
@struct_options(ThroughputOptions, OFFLINE_HELP)
@struct_options(EngineArgs, HELP, skip=frozenset({"model"}))
def throughput(model: str, **values: Any) -> None:
    """Measure an engine of MODEL in this process: tokens a second of many prompts at once."""
    from millrace.offline.runs import measure_throughput

    options = msgspec.convert(given(values, ThroughputOptions), ThroughputOptions)
    click.echo(measure_throughput(model, options, given(values, EngineArgs)))


@bench.command(cls=EngineCommand)
@click.argument("model")
@struct_options(LatencyOptions, OFFLINE_HELP)
@struct_options(EngineArgs, HELP, skip=frozenset({"model"}))
def latency(model: str, **values: Any) -> None:
    """Measure an engine of MODEL in this process: the time that one batch takes."""
    from millrace.offline.runs import measure_latency

    options = msgspec.convert(given(values, LatencyOptions), LatencyOptions)
    click.echo(measure_latency(model, options, given(values, EngineArgs)))
