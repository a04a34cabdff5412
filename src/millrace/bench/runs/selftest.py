"""The error of the load generator, measured against a server that stamps what it sends.

At each level of concurrency the built-in mock streams at a fixed pace and stamps its chunks. The
same formulas are applied to the stamps and to what the client saw; the difference is the error. A
request starts at the client's own time. How long after it the mock had read the request is given
separately (`read_ms`): it contains the client's sending and the mock's own queue, which cannot be
told apart here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

from millrace.bench.flags.structs import SelftestFlags
from millrace.bench.load.interrupts import InterruptedRunError, Interrupts, unless_stopped
from millrace.bench.load.options import BenchOptions
from millrace.bench.load.records import RequestTiming
from millrace.bench.measure.metrics import Summary, Window, summarize
from millrace.bench.report.save import provenance, write_json
from millrace.bench.report.tables import aligned
from millrace.bench.runs.options_from_flags import positive_counts
from millrace.bench.runs.serve import Run, run
from millrace.bench.workload.prompts import RandomSpec
from millrace.common.child_process import kill_process, python_module
from millrace.common.http_client import Target
from millrace.errors import UserError

FIRST_S, GAP_S = 0.05, 0.05
MOST_ERROR = {"p50": 0.02, "p99": 0.05}
_COMMAND = python_module("millrace.bench.runs.mock")
_LIMIT_S = 30.0


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """One level. Errors are relative, by figure and percentile; that of throughput is separate.
    Shares are of a core. read_ms: from a request's start until the mock had read it."""

    streams: int
    chunks_per_s: float
    us_per_chunk: float
    client_share: float
    mock_share: float
    errors: dict[str, dict[str, float]]
    throughput_error: float
    read_ms: dict[str, float]
    failed: int
    client: dict[str, Any]

    @property
    def within(self) -> bool:
        """Whether every error is within the limits."""
        worst = [
            (abs(error), MOST_ERROR[figure])
            for by_figure in self.errors.values()
            for figure, error in by_figure.items()
        ]
        return not self.failed and all(
            error <= most for error, most in [*worst, (abs(self.throughput_error), 0.02)]
        )


def run_selftest(flags: SelftestFlags) -> int:
    """Measure and print every level; the exit status is 1 when an error is too large."""
    if flags.processes < 1 or not flags.seconds > 0:
        raise UserError("--processes and --seconds: use numbers above 0")
    streams = positive_counts(flags.streams, "--streams")
    with Interrupts() as interrupts:
        levels = interrupts.run(
            lambda stop: selftest(
                streams,
                processes=flags.processes,
                seconds=flags.seconds,
                chat=flags.chat,
                on_level=lambda level: click.echo(f"{level.streams} streams measured", err=True),
                stop=stop,
            )
        )
        _report(levels, flags)
    return interrupts.status or (0 if all(level.within for level in levels) else 1)


def _report(levels: Sequence[Level], flags: SelftestFlags) -> None:
    click.echo("\n".join(aligned(level_rows(levels))))
    for level in levels:
        if level.client["client_bound"]:
            click.echo(f"{level.streams} streams: {level.client['advice']}", err=True)
    if flags.json:
        path = write_json(Path(flags.json), {"levels": levels, **provenance()})
        click.echo(f"written to {path}")


async def selftest(
    streams: Sequence[int],
    *,
    processes: int = 1,
    seconds: float = 5.0,
    chat: bool = False,
    on_level: Callable[[Level], None] | None = None,
    stop: asyncio.Event | None = None,
) -> list[Level]:
    """Measure every level for about this many seconds. on_level is called with each. `stop` ends
    it early, with the levels that are done."""
    levels: list[Level] = []
    with contextlib.suppress(InterruptedRunError):
        for count in streams:
            level = await unless_stopped(_level(count, processes, seconds, chat), stop)
            levels.append(level)
            if on_level is not None:
                on_level(level)
    return levels


async def _level(streams: int, processes: int, seconds: float, chat: bool) -> Level:
    tokens = max(4, round((seconds / 4 - FIRST_S) / GAP_S))
    async with _mock() as (target, cpu_of_mock):
        options = BenchOptions(
            target=target,
            backend="openai-chat" if chat else "openai",
            # Answers of different lengths, so that requests do not all leave at once.
            workload=RandomSpec(
                count=4 * streams, input_len=256, output_len=tokens, range_ratio=0.5
            ),
            max_concurrency=streams,
            num_warmups=streams,
            processes=processes,
            percentiles=(50.0, 99.0),
        )
        began = time.perf_counter()
        measured = await run(options)
        wall = time.perf_counter() - began
        cpu = await cpu_of_mock()
    return level_of(streams, measured, cpu / wall)


def level_of(streams: int, measured: Run, mock_share: float) -> Level:
    """The errors of a run against the stamps in its records."""
    seen = measured.summary
    true = summarize(truths(measured.records), percentiles=(50.0, 99.0))
    chunks = sum(len(r.chunk_ns) for r in measured.records)
    return Level(
        streams=streams,
        chunks_per_s=chunks / seen.overall.duration,
        us_per_chunk=measured.client.us_per_chunk,
        client_share=measured.client.cpu_share,
        mock_share=mock_share,
        errors=errors_of(seen.overall, true.overall),
        throughput_error=_relative(*(_output_rate(s) for s in (seen, true))),
        read_ms=_read_ms(measured.records),
        failed=seen.failed,
        client=msgspec.to_builtins(measured.client),
    )


def truths(records: Sequence[RequestTiming]) -> list[RequestTiming]:
    """The records, with the send time of each chunk in place of its arrival."""
    return [
        msgspec.structs.replace(
            record,
            chunk_ns=array("q", record.sent_ns),
            end_ns=record.sent_ns[-1],
        )
        for record in records
        if record.error is None and len(record.sent_ns)
    ]


def _read_ms(records: Sequence[RequestTiming]) -> dict[str, float]:
    waits = [(r.received_ns - r.start_ns) / 1e6 for r in records if r.received_ns] or [0.0]
    p50, p99 = np.percentile(waits, [50, 99])
    return {"p50": float(p50), "p99": float(p99)}


def errors_of(seen: Window, true: Window) -> dict[str, dict[str, float]]:
    """Relative errors of TTFT, TPOT and ITL at the median and the 99th percentile."""
    return {
        name: {
            f"p{percentile:g}": _relative(
                seen.latencies[name].percentiles[percentile],
                true.latencies[name].percentiles[percentile],
            )
            for percentile in (50.0, 99.0)
        }
        for name in ("ttft", "tpot", "itl")
    }


def _relative(seen: float, true: float) -> float:
    return seen / true - 1 if true else 0.0


def _output_rate(summary: Summary) -> float:
    return summary.overall.output_throughput


@asynccontextmanager
async def _mock() -> AsyncIterator[tuple[Target, Callable[[], Any]]]:
    """A mock server in a process of its own: its address, and a function that ends it and returns
    its CPU seconds. Reaped at the end."""
    process = await asyncio.create_subprocess_exec(
        *(*_COMMAND, str(FIRST_S), str(GAP_S)), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    lines = process.stdout

    async def line() -> str:
        return (await asyncio.wait_for(lines.readline(), _LIMIT_S)).decode().strip()

    async def end() -> float:
        process.terminate()
        return float(await line() or 0.0)

    try:
        yield Target("127.0.0.1", int(await line())), end
    finally:
        await kill_process(process)


_HEADINGS = (
    *("streams", "chunks/s", "us/chunk", "client CPU", "mock CPU"),
    *("TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "ITL p50", "ITL p99", "tok/s"),
    *("read p50 / p99 ms", "verdict"),
)


def level_rows(levels: Sequence[Level]) -> list[tuple[str, ...]]:
    """The table: headings, then a row for each level, errors in per cent."""
    return [_HEADINGS, *(_row(level) for level in levels)]


def _row(level: Level) -> tuple[str, ...]:
    errors = [
        f"{100 * level.errors[name][figure]:+.2f}%"
        for name in ("ttft", "tpot", "itl")
        for figure in ("p50", "p99")
    ]
    verdict = "good" if level.within else "off"
    if level.failed:
        verdict = f"{level.failed} failed"
    return (
        *(str(level.streams), f"{level.chunks_per_s:,.0f}", f"{level.us_per_chunk:.1f}"),
        *(f"{level.client_share:.0%}", f"{level.mock_share:.0%}"),
        *errors,
        f"{100 * level.throughput_error:+.2f}%",
        f"{level.read_ms['p50']:.2f} / {level.read_ms['p99']:.2f}",
        verdict,
    )
