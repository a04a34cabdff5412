"""`millrace batch`: its options, and what runs its requests: servers, or an engine of its own."""

from __future__ import annotations

import os
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from millrace.batch.options import BATCH_HELP, BatchOptions
from millrace.common.flags import given, struct_options
from millrace.config import HELP, EngineArgs
from millrace.errors import ConfigError
from millrace.offline.command import EngineCommand

if TYPE_CHECKING:
    import asyncio

    from millrace.batch.input_file import InputFile
    from millrace.batch.journal import Journal

_FAILED = 1
_SHORT = {"-i": "--input-file", "-o": "--output-file"}


class _BatchCommand(EngineCommand):
    """Also with the short names of vLLM's run-batch."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_SHORT.get(word, word) for word in args])


@click.command("batch", cls=_BatchCommand)
@click.argument("model", required=False)
@click.option(
    "-i",
    "--input-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with one request a line, in the format of OpenAI's batches.",
)
@click.option(
    "-o",
    "--output-file",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="File for the results, in the order in which they come.",
)
@click.option(
    "--task",
    type=click.Choice(["policy"]),
    help="Generated insurance policies instead of an input file; the answers are graded.",
)
@click.option("--num-items", type=click.IntRange(1), help="Of the task.  [default: 50000]")
@click.option(
    "--plan-gpu",
    help="What a replica runs on, for the planner's estimate of the task: `millrace plan gpus`.",
)
@struct_options(BatchOptions, BATCH_HELP, skip=frozenset({"model"}))
@struct_options(EngineArgs, HELP, skip=frozenset({"model"}))
@click.pass_context
def batch(
    ctx: click.Context,
    /,
    model: str | None,
    input_file: Path | None,
    output_file: Path,
    task: str | None,
    num_items: int | None,
    plan_gpu: str | None,
    **values: Any,
) -> None:
    """Answer every request of a file exactly once, over servers or with a model of its own.

    MODEL (or --model MODEL): with --base-url, the model to ask for instead of that of each line;
    else the model to run. After a kill, or any other end, the same command goes on where it
    stopped.
    """
    values["model"] = model
    options = msgspec.convert(given(values, BatchOptions), BatchOptions)
    engine = given({**values, "model": None}, EngineArgs)
    if options.api_key is None and (key := os.environ.get("OPENAI_API_KEY")):
        options = msgspec.structs.replace(options, api_key=key)
    if task is None:
        if num_items is not None or plan_gpu is not None:
            raise ConfigError("--num-items and --plan-gpu are of --task policy")
        if input_file is None:
            raise ConfigError("name a file of requests with -i, or use --task policy")
        ctx.exit(_run(input_file, output_file, options, engine))
    if input_file is not None:
        raise ConfigError("-i and --task exclude each other")
    ctx.exit(_run_policies(output_file, num_items or 50_000, plan_gpu, options, engine))


def _run_policies(
    output: Path, number: int, gpu: str | None, options: BatchOptions, engine: dict[str, Any]
) -> int:
    """Generated policies; at the end their accuracy, and what the planner expected."""
    from millrace.hardware.gpus import gpu as find_gpu
    from millrace.offline import policy_batch

    _check(options, engine)
    if options.model is None:
        raise ConfigError("--task policy: name the model with --model, also for servers")
    if gpu is not None:
        find_gpu(gpu)
    requests = output.with_name(f"{output.stem}.requests{output.suffix}")
    policy_batch.write_requests(requests, number, options.model)
    status = _run(requests, output, options, engine)
    if status:
        return status
    _say(policy_batch.accuracy(output, number))
    if gpu is not None:
        _say(_estimate(output, gpu, options))
    return 0


def _estimate(output: Path, gpu: str, options: BatchOptions) -> str:
    from millrace.batch.journal import read_counts
    from millrace.model_lookup import find_model
    from millrace.offline import policy_batch

    assert options.model is not None
    return policy_batch.estimate(
        read_counts(output), gpu, str(find_model(options.model)),
        max(1, len(options.base_url)), options.max_in_flight,
    )  # fmt: skip


def _run(input_file: Path, output_file: Path, options: BatchOptions, engine: dict[str, Any]) -> int:
    """Run it; the exit status: 1 if it has to be run again to go on."""
    from millrace.batch.input_file import InputFile
    from millrace.batch.journal import Journal, StopError

    _check(options, engine)
    errors = Path(options.error_file) if options.error_file else _error_file(output_file)
    if len({path.resolve() for path in (input_file, output_file, errors)}) < 3:
        raise ConfigError("input, output and error file must be three files")
    try:
        with (
            closing(InputFile(input_file, options.model)) as source,
            closing(Journal(output_file, errors)) as journal,
        ):
            journal.load(source)
            return _answer_all(source, journal, options, engine)
    except StopError as error:
        click.echo(f"millrace batch: {error}", err=True)
        return _FAILED


def _check(options: BatchOptions, engine: dict[str, Any]) -> None:
    options.dispatch()
    options.targets()
    if options.base_url and engine:
        name = next(iter(engine)).replace("_", "-")
        raise ConfigError(f"--{name} is the engine's; with --base-url the servers have engines")
    if not options.base_url and options.model is None:
        raise ConfigError("name servers with --base-url, or a model to run here with --model")


def _error_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}.errors{output.suffix}")


def _answer_all(
    source: InputFile, journal: Journal, options: BatchOptions, engine: dict[str, Any]
) -> int:
    from millrace.bench.load.interrupts import Interrupts

    counts = journal.counts
    if counts.done:
        _say(f"{counts.done:,} of {counts.total:,} requests are done already")
    if counts.done == counts.total:
        return 0
    with Interrupts() as interrupts:
        run = _through_servers if options.base_url else partial(_through_engine, engine)
        whole = interrupts.run(partial(run, source, journal, options))
        if not whole:
            left = journal.counts.total - journal.counts.done
            _say(f"{left:,} requests are left; the same command goes on")
    return interrupts.status or (0 if whole else _FAILED)


async def _through_servers(
    source: InputFile, journal: Journal, options: BatchOptions, stop: asyncio.Event
) -> bool:
    from millrace.batch.run import http_endpoints, run_batch

    return await run_batch(source, journal, http_endpoints(options), options, _say, stop)


async def _through_engine(
    engine: dict[str, Any],
    source: InputFile,
    journal: Journal,
    options: BatchOptions,
    stop: asyncio.Event,
) -> bool:
    from millrace.batch.run import run_batch
    from millrace.config import engine_args
    from millrace.offline.engine_endpoint import engine_endpoint

    args = engine_args(model=options.model, **engine)
    async with engine_endpoint(args) as (endpoint, limit):
        most = min(options.max_in_flight, limit)
        options = msgspec.structs.replace(options, max_in_flight=most)
        return await run_batch(source, journal, [endpoint], options, _say, stop)


def _say(line: str) -> None:
    click.echo(line, err=True)
