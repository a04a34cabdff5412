"""How throughput grows with replicas: serve on 1, 2, 3, run one workload, check accuracy.

Each count has a server of its own, started and reaped here. Repeats are interleaved (all counts,
then all again), so that a machine whose speed drifts does not favour one count. Figures are medians
over repeats.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from millrace.bench.load.interrupts import InterruptedRunError, unless_stopped
from millrace.bench.load.options import BenchOptions
from millrace.bench.report.results import hit_rate, hit_text
from millrace.bench.report.tables import aligned
from millrace.bench.runs.accuracy import Accuracy, measure_accuracy
from millrace.bench.runs.options_from_flags import with_run_seed
from millrace.bench.runs.serve import run
from millrace.common.child_process import python_module
from millrace.common.http_client import Target
from millrace.common.sockets import free_port
from millrace.errors import UserError
from millrace.fleet.device_assignment import thread_limit, usable_cores, visible_gpus
from millrace.fleet.replica_process import ReplicaProcess, start_and_wait_healthy

MILLRACE = tuple(python_module("millrace.cli"))
_LOOPBACK = "127.0.0.1"
GRACE = 30.0  # seconds; more than a supervisor needs for its own replicas
_LATENCIES = ("ttft", "tpot", "itl")
_FIGURES = ("mean", "median", "p99")


class ScalingOptions(msgspec.Struct, frozen=True, kw_only=True):
    """model and serve_arguments are passed to the serve command; load is the workload, with a
    target that is not set yet. accuracy_items: 0 for no check. Timeouts are in seconds."""

    serve_command: Sequence[str] = (*MILLRACE, "serve")
    eval_command: Sequence[str] = (*MILLRACE, "eval")
    model: str
    counts: Sequence[int]
    load: BenchOptions
    serve_arguments: Sequence[str] = ()
    repeats: int = 1
    accuracy_task: str = "math"
    accuracy_items: int = 50
    start_timeout: float = 900.0
    accuracy_timeout: float = 600.0


class ScalingRow(msgspec.Struct, kw_only=True):
    """One count of replicas: the result fields of each run, and the accuracy."""

    replicas: int
    runs: list[dict[str, Any]] = []
    accuracy: Accuracy = Accuracy(None, reason="not measured")

    def figure(self, name: str) -> float:
        """Median of a result field over the runs."""
        return statistics.median(float(run[name]) for run in self.runs)

    @property
    def every_run(self) -> list[dict[str, Any]]:
        """All runs whose requests count."""
        return self.runs

    @property
    def hit_rate(self) -> float | None:
        """Median hit rate of prefix caches over the runs that know it."""
        known = [rate for run in self.runs if (rate := hit_rate(run)) is not None]
        return statistics.median(known) if known else None


async def measure_scaling(
    options: ScalingOptions, on_step: Callable[[str], None], stop: asyncio.Event | None = None
) -> list[ScalingRow]:
    """Measure every count; on_step is called with a description of each step before it begins.
    `stop` ends it early: rows that were not measured have no runs.

    Raises UserError when a server does not come up or fails its first request.
    """
    rows = [ScalingRow(replicas=count) for count in options.counts]
    with contextlib.suppress(InterruptedRunError):
        for repeat in range(options.repeats):
            for row in rows:
                on_step(f"{row.replicas} replica(s), run {repeat + 1} of {options.repeats}")
                await _measure(options, row, repeat, on_step, stop)
    return rows


async def _measure(
    options: ScalingOptions,
    row: ScalingRow,
    repeat: int,
    on_step: Callable[[str], None],
    stop: asyncio.Event | None,
) -> None:
    """One run of a count, in the first repeat with its accuracy. Raises InterruptedRunError."""
    async with served(options, row.replicas, stop=stop) as target:
        load = with_run_seed(options.load, repeat)
        measured = await run(msgspec.structs.replace(load, target=target), stop=stop)
        if measured.fields["completed"] == 0 and not measured.interrupted:
            first = next(r.error for r in measured.records if r.error)
            raise UserError(f"{row.replicas} replica(s): no request succeeded: {first}")
        if measured.fields["completed"]:
            row.runs.append(measured.fields)
        if repeat == 0:
            on_step(f"{row.replicas} replica(s), accuracy")
            row.accuracy = await unless_stopped(check_accuracy(options, target), stop)


async def check_accuracy(options: ScalingOptions, target: Target) -> Accuracy:
    """The accuracy of the server at `target`, or the reason why there is none."""
    if not options.accuracy_items:
        return Accuracy(None, reason="not asked for")
    if "dummy" in " ".join(options.serve_arguments).replace("=", " ").split():
        return Accuracy(None, reason="random weights (--load-format dummy)")
    return await measure_accuracy(
        str(target),
        command=options.eval_command,
        task=options.accuracy_task,
        items=options.accuracy_items,
        limit=options.accuracy_timeout,
    )


@asynccontextmanager
async def served(
    options: ScalingOptions,
    replicas: int,
    arguments: Sequence[str] = (),
    stop: asyncio.Event | None = None,
) -> AsyncIterator[Target]:
    """`millrace serve` with that many replicas, healthy, on a free port; reaped at the end.

    options.counts: the devices of each row. arguments: further ones, for this server alone.
    """
    target = Target(_LOOPBACK, free_port(_LOOPBACK))
    command = [
        *(*options.serve_command, options.model),
        *("--replicas", str(replicas), "--host", target.host, "--port", str(target.port)),
        *arguments,
        *options.serve_arguments,
    ]
    process = ReplicaProcess(command, replica_threads(options.counts), on_line=lambda line: None)
    try:
        name = f"the server of {options.model}"
        await start_and_wait_healthy(process, target, name, options.start_timeout)
        yield target
    finally:
        await process.stop(GRACE)


def replica_threads(counts: Sequence[int]) -> dict[str, str]:
    """Threads of a replica. Without GPUs the cores are the devices: in every row a replica gets the
    share that it has in the largest row, so that the rows can be compared."""
    if visible_gpus() or thread_limit():
        return {}
    return {"OMP_NUM_THREADS": str(max(1, usable_cores() // max(counts)))}


def scaling_fields(rows: Sequence[ScalingRow]) -> list[dict[str, Any]]:
    """The table as data: medians over repeats, throughput in tok/s, latencies in ms.

    efficiency: throughput per replica, relative to that of the first row.
    """
    base = rows[0].figure("total_token_throughput") / rows[0].replicas
    table = []
    for row in rows:
        total = row.figure("total_token_throughput")
        latencies = [f"{figure}_{name}_ms" for name in _LATENCIES for figure in _FIGURES]
        table.append(
            {
                "replicas": row.replicas,
                "total_token_throughput": total,
                "output_throughput": row.figure("output_throughput"),
                "users": row.figure("max_concurrent_requests"),
                "request_throughput": row.figure("request_throughput"),
                "per_replica": total / row.replicas,
                "efficiency": total / row.replicas / base if base else 0.0,
                **{name: row.figure(name) for name in latencies},
                "prefix_cache_hit_rate": row.hit_rate,
                "completed": sum(run["completed"] for run in row.runs),
                "failed": sum(run["failed"] for run in row.runs),
                "accuracy": row.accuracy.value,
                "accuracy_items": row.accuracy.items,
                "accuracy_reason": row.accuracy.reason,
            }
        )
    return table


_HEADINGS = (
    "replicas",
    "total tok/s",
    "per replica",
    "efficiency",
    "output tok/s",
    "users",
    "req/s",
    "TTFT ms",
    "TPOT ms",
    "ITL ms",
    "prefix hits",
    "accuracy",
)


def scaling_table(rows: Sequence[ScalingRow]) -> str:
    """The table as text (Markdown); latencies are mean / median / p99."""
    cells: list[Sequence[str]] = [_HEADINGS]
    for row, fields in zip(rows, scaling_fields(rows), strict=True):
        cells.append(
            (
                str(row.replicas),
                f"{fields['total_token_throughput']:,.0f}",
                f"{fields['per_replica']:,.0f}",
                f"{fields['efficiency']:.1%}",
                f"{fields['output_throughput']:,.0f}",
                f"{fields['users']:.0f}",
                f"{fields['request_throughput']:,.2f}",
                *(_latency_cell(fields, name) for name in _LATENCIES),
                hit_text(row.hit_rate),
                str(row.accuracy),
            )
        )
    lines = aligned(cells)
    notes = {row.accuracy.reason for row in rows if row.accuracy.reason}
    lines += [f"accuracy n/a: {reason}" for reason in sorted(notes)]
    failed = sum(fields["failed"] for fields in scaling_fields(rows))
    return "\n".join([*lines, *([f"{failed} requests failed"] if failed else [])])


def _latency_cell(fields: dict[str, Any], name: str) -> str:
    return " / ".join(f"{fields[f'{figure}_{name}_ms']:,.1f}" for figure in _FIGURES)
