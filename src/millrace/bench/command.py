"""`millrace bench`: options in, tables and files out."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from millrace.bench.metrics import LATENCIES, Record
from millrace.bench.report import error_lines, table
from millrace.bench.scaling import (
    ScalingOptions,
    measure_scaling,
    scaling_fields,
    scaling_table,
)
from millrace.bench.serve import Backend, BenchOptions, Run, run
from millrace.bench.workload import (
    DATASETS,
    Prompt,
    RandomSpec,
    RangeConvention,
    check_spec,
    random_prompts,
    workload_line,
)
from millrace.errors import UserError
from millrace.http1 import Target, parse_url

INTERRUPTED = 130


@click.group()
def bench() -> None:
    """Measure a server: throughput and latency, with accuracy beside them."""


def load_flags(**defaults: Any) -> Callable[[Any], Any]:
    """Decorator: the flags of a workload and its load, with these defaults."""

    def default(name: str) -> Any:
        return {"default": defaults[name], "show_default": True}

    flags = [
        click.option("--dataset-name", type=click.Choice(DATASETS), default="random"),
        click.option("--num-prompts", type=int, **default("num_prompts")),
        click.option("--random-input-len", type=int, **default("input_len")),
        click.option("--random-output-len", type=int, **default("output_len")),
        click.option("--random-prefix-len", type=int, default=0, help="Tokens all prompts share."),
        click.option("--random-range-ratio", type=float, **default("range_ratio")),
        click.option(
            "--random-range-convention",
            type=click.Choice(get_args(RangeConvention)),
            default="vllm",
            show_default=True,
            help="vllm: lengths in [L(1-r), L(1+r)]; inferencex: in [L*r, L].",
        ),
        click.option("--random-vocab-size", type=int, help="Token ids to draw from."),
        click.option(
            "--max-concurrency", type=int, help="Requests in flight.", **default("concurrency")
        ),
        click.option("--request-rate", type=float, default=math.inf, help="Requests a second."),
        click.option(
            "--burstiness", type=float, default=1.0, help="1 is Poisson, below in bursts."
        ),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option(
            "--ignore-eos/--no-ignore-eos",
            help="Go on to the length asked.",
            **default("ignore_eos"),
        ),
        click.option("--temperature", type=float, default=0.0, show_default=True),
        click.option("--num-warmups", type=int, help="Requests before.", **default("warmups")),
        click.option("--extra-body", default="{}", help="JSON merged into every request."),
        click.option("--request-timeout", type=float, default=600.0, help="Seconds a request."),
    ]

    def decorate(command: Any) -> Any:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return decorate


@bench.command()
@click.option("--backend", type=click.Choice(get_args(Backend)), default="openai")
@click.option("--base-url", help="Server's URL; otherwise --host and --port.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=8000, show_default=True)
@click.option("--endpoint", help="Path of the API (default: by backend).")
@click.option("--model", help="Model name (default: the first that the server names).")
@click.option("--header", multiple=True, help="Extra header, as Name=Value. Repeatable.")
@click.option("--ready-check-timeout-sec", type=float, default=0.0, help="Wait for the server.")
@click.option("--save-result", is_flag=True, help="Write the figures as JSON.")
@click.option("--save-detailed", is_flag=True, help="Also each request's times, in that file.")
@click.option("--result-dir", type=click.Path(file_okay=False), default=".")
@click.option("--result-filename", help="Name of the JSON file (default: from the run).")
@click.option("--disable-tqdm", is_flag=True, help="Show no progress bar.")
@click.option("--percentile-metrics", default="ttft,tpot,itl", show_default=True)
@click.option("--metric-percentiles", default="99", show_default=True)
@click.option("--goodput", multiple=True, help="Objective in ms, as ttft:500. Repeatable.")
@load_flags(
    num_prompts=1000,
    input_len=1024,
    output_len=128,
    range_ratio=0.0,
    concurrency=None,
    ignore_eos=False,
    warmups=0,
)
def serve(**flags: Any) -> None:
    """Load a running server and print its figures."""
    options = serve_options(flags)
    shown = _metric_names(flags["percentile_metrics"])
    progress = _Progress(options, hidden=flags["disable_tqdm"])
    outcome = uvloop.run(_interruptible(options, progress))
    click.echo(table(outcome.fields, shown, options.percentiles))
    for line in [*error_lines(outcome.records), *_remarks(outcome)]:
        click.echo(line, err=True)
    if flags["save_result"] or flags["save_detailed"] or flags["result_filename"]:
        click.echo(f"written to {_save(outcome, flags)}")
    if outcome.interrupted or outcome.fields["failed"]:
        raise click.exceptions.Exit(INTERRUPTED if outcome.interrupted else 1)


@bench.command()
@click.argument("model")
@click.argument("serve_arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--replicas", default="1,2,3", show_default=True, help="Counts to compare.")
@click.option("--repeats", type=int, default=1, show_default=True, help="Interleaved; medians.")
@click.option("--accuracy-task", default="math", show_default=True)
@click.option("--accuracy-items", type=int, default=50, show_default=True, help="0 for no check.")
@click.option("--start-timeout", type=float, default=900.0, help="Seconds for a server to start.")
@click.option("--result-dir", type=click.Path(file_okay=False), default="bench-results")
@click.option("--result-filename", help="Name of the JSON file (default: from the run).")
@load_flags(
    num_prompts=64,
    input_len=128,
    output_len=64,
    range_ratio=0.5,
    concurrency=16,
    ignore_eos=True,
    warmups=16,
)
def scaling(**flags: Any) -> None:
    """Serve MODEL on 1, 2 and 3 replicas and print how throughput grows, accuracy beside it.

    What stands behind `--` goes to `millrace serve` as it is.
    """
    options = ScalingOptions(
        model=flags["model"],
        counts=_counts(flags["replicas"]),
        load=load_options(flags, Target("127.0.0.1", 0)),
        serve_arguments=flags["serve_arguments"],
        repeats=flags["repeats"],
        accuracy_task=flags["accuracy_task"],
        accuracy_items=flags["accuracy_items"],
        start_timeout=flags["start_timeout"],
    )
    spec = options.load.workload
    click.echo(workload_line(spec, random_prompts(spec)), err=True)
    rows = uvloop.run(measure_scaling(options, lambda step: click.echo(step, err=True)))
    click.echo(scaling_table(rows))
    date = rows[0].runs[0]["date"]
    report = {
        "date": date,
        "model": options.model,
        "serve_arguments": options.serve_arguments,
        "cores": len(os.sched_getaffinity(0)),
        "table": scaling_fields(rows),
        "rows": rows,
    }
    path = Path(flags["result_dir"]) / (flags["result_filename"] or f"scaling-{date}.json")
    click.echo(f"written to {_write_json(path, report)}")
    if any(run["failed"] for row in rows for run in row.runs):
        raise click.exceptions.Exit(1)


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UserError(f"--replicas {text!r}: use counts from 1 on, as 1,2,3")
    return counts


def serve_options(flags: dict[str, Any]) -> BenchOptions:
    """BenchOptions from the flags of `bench serve`. Raises UserError for the first bad one."""
    return msgspec.structs.replace(
        load_options(flags, _target(flags)),
        backend=flags["backend"],
        endpoint=flags["endpoint"],
        model=flags["model"],
        headers=_headers(flags["header"]),
        percentiles=_percentiles(flags["metric_percentiles"]),
        objectives=_objectives(flags["goodput"]),
        ready_timeout=flags["ready_check_timeout_sec"],
    )


def load_options(flags: dict[str, Any], target: Target) -> BenchOptions:
    """BenchOptions from `load_flags`. Raises UserError for the first bad one."""
    spec = RandomSpec(
        count=flags["num_prompts"],
        input_len=flags["random_input_len"],
        output_len=flags["random_output_len"],
        range_ratio=flags["random_range_ratio"],
        convention=flags["random_range_convention"],
        prefix_len=flags["random_prefix_len"],
        seed=flags["seed"],
    )
    check_spec(spec)
    if flags["max_concurrency"] is not None and flags["max_concurrency"] < 1:
        raise UserError(f"--max-concurrency {flags['max_concurrency']}: use 1 or more")
    return BenchOptions(
        target=target,
        workload=spec,
        vocab_size=flags["random_vocab_size"],
        request_rate=flags["request_rate"],
        burstiness=flags["burstiness"],
        max_concurrency=flags["max_concurrency"],
        num_warmups=flags["num_warmups"],
        temperature=flags["temperature"],
        ignore_eos=flags["ignore_eos"],
        extra_body=_json_object("--extra-body", flags["extra_body"]),
        timeout=flags["request_timeout"],
    )


def _target(flags: dict[str, Any]) -> Target:
    if flags["base_url"]:
        return parse_url(flags["base_url"])
    return Target(flags["host"], flags["port"])


def _headers(given: Sequence[str]) -> tuple[tuple[str, str], ...]:
    pairs = []
    for text in given:
        name, found, value = text.partition("=")
        if not found or not name:
            raise UserError(f"--header {text!r}: use the form Name=Value")
        pairs.append((name, value))
    if key := os.environ.get("OPENAI_API_KEY"):
        pairs.append(("Authorization", f"Bearer {key}"))
    return tuple(pairs)


def _json_object(flag: str, text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise UserError(f'{flag}: use a JSON object such as {{"top_k": 5}} ({error})') from None


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (-1.0,)
    if not all(0 <= value <= 100 for value in values):
        raise UserError(f"--metric-percentiles {text!r}: use numbers from 0 to 100, as 50,90,99")
    return values


def _metric_names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in LATENCIES:
            raise UserError(f"--percentile-metrics {name!r}: use any of {','.join(LATENCIES)}")
    return names


def _objectives(given: Sequence[str]) -> dict[str, float]:
    objectives = {}
    for text in " ".join(given).split():
        name, _, limit = text.partition(":")
        try:
            objectives[name] = float(limit)
        except ValueError:
            name = ""
        if name not in ("ttft", "tpot", "e2el"):
            raise UserError(f"--goodput {text!r}: use ttft:MS, tpot:MS or e2el:MS")
    return objectives


# --- running -----------------------------------------------------------------------------------


class _Progress:
    """A bar on the terminal, drawn from a timer so that a record costs next to nothing."""

    def __init__(self, options: BenchOptions, *, hidden: bool) -> None:
        self._options = options
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("requests"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            disable=hidden or not console.is_terminal,
        )
        self._done = 0

    def start(self, prompts: Sequence[Prompt]) -> None:
        click.echo(workload_line(self._options.workload, prompts), err=True)
        self._task = self._bar.add_task("requests", total=len(prompts))
        self._bar.start()

    def count(self, record: Record) -> None:
        self._done += 1

    async def draw(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            if self._bar.live.is_started:
                self._bar.update(self._task, completed=self._done, refresh=True)

    def stop(self) -> None:
        if self._bar.live.is_started:
            self._bar.update(self._task, completed=self._done, refresh=True)
            self._bar.stop()


async def _interruptible(options: BenchOptions, progress: _Progress) -> Run:
    """The run; SIGINT ends it with what was measured, a second one ends the process."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    drawing = asyncio.create_task(progress.draw())
    try:
        return await run(options, stop=stop, on_start=progress.start, on_record=progress.count)
    finally:
        drawing.cancel()
        progress.stop()


def _remarks(outcome: Run) -> list[str]:
    """What a reader of the table must know besides."""
    fields, remarks = outcome.fields, []
    if fields["usage_missing"]:
        remarks.append(
            f"{fields['usage_missing']} answers told no usage: their chunks were counted as tokens"
        )
    if fields["client"]["cpu_share"] > 0.8:
        remarks.append(
            f"the client used {fields['client']['cpu_share']:.0%} of a core: "
            "it may have bounded the figures"
        )
    return remarks


def _save(outcome: Run, flags: dict[str, Any]) -> Path:
    fields = dict(outcome.fields)
    if not flags["save_detailed"]:
        for name in ("input_lens", "output_lens", "start_times", "ttfts", "itls", "errors"):
            del fields[name]
    concurrency = f"-concurrency{fields['max_concurrency']}" if fields["max_concurrency"] else ""
    model = str(fields["model_id"]).rstrip("/").rsplit("/", 1)[-1]
    default = (
        f"{fields['backend']}-{fields['request_rate']}qps{concurrency}-{model}-"
        f"{fields['date']}.json"
    )
    return _write_json(Path(flags["result_dir"]) / (flags["result_filename"] or default), fields)


def _write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content)))
    return path
