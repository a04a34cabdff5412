"""What a gateway costs: replicas loaded directly, then through the gateway, one row for each count.

Both loads are of one size and kind, with prompts of their own, and alternate: each repeat measures
both on the same replicas. Directly, a request goes to the replica that has the fewest of the load
process's. The gateway and its replicas are started and reaped here, or are those of a URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from millrace.bench.load.interrupts import InterruptedRunError, unless_stopped
from millrace.bench.load.options import BenchOptions
from millrace.bench.report.tables import aligned
from millrace.bench.runs.options_from_flags import with_run_seed
from millrace.bench.runs.scaling import (
    GRACE,
    MILLRACE,
    ScalingOptions,
    ScalingRow,
    check_accuracy,
    replica_threads,
)
from millrace.bench.runs.serve import run
from millrace.common.http_client import Target, parse_url
from millrace.common.sockets import free_port
from millrace.errors import UserError
from millrace.fleet.replica_process import ReplicaProcess, start_and_wait_healthy
from millrace.gateway.admin.status import read_status

_LOOPBACK = "127.0.0.1"


class GatewayRow(ScalingRow, kw_only=True):
    """One count of replicas. runs: through the gateway; direct: each one's twin without it."""

    direct: list[dict[str, Any]] = msgspec.field(default_factory=list)

    @property
    def every_run(self) -> list[dict[str, Any]]:
        return [*self.direct, *self.runs]

    @property
    def lost(self) -> float:
        """The share of the direct throughput that is lost; the median over repeats."""
        pairs = zip(self.direct, self.runs, strict=True)
        return statistics.median(1 - _speed(through) / _speed(direct) for direct, through in pairs)

    def of_direct(self, name: str) -> float:
        """Median of a result field over the direct runs."""
        return statistics.median(float(run[name]) for run in self.direct)


def _speed(run: dict[str, Any]) -> float:
    return float(run["total_token_throughput"])


async def measure_gateway(
    options: ScalingOptions,
    on_step: Callable[[str], None],
    stop: asyncio.Event | None = None,
    url: str | None = None,
) -> list[GatewayRow]:
    """A row for every count, or one for the running gateway at `url`. on_step and stop are as in
    `measure_scaling`; the load's requests and streams are for one replica.

    Raises UserError when a server does not come up or fails its first request.
    """
    if url is not None:
        rows = [GatewayRow(replicas=len(await replicas_of(parse_url(url))))]
    else:
        rows = [GatewayRow(replicas=count) for count in options.counts]
    with contextlib.suppress(InterruptedRunError):
        for repeat in range(options.repeats):
            for row in rows:
                on_step(f"{row.replicas} replica(s), run {repeat + 1} of {options.repeats}")
                async with _gateway(options, row.replicas, url) as target:
                    await _measure(options, row, target, repeat, on_step, stop)
    return [row for row in rows if row.runs]


async def _measure(
    options: ScalingOptions,
    row: GatewayRow,
    target: Target,
    repeat: int,
    on_step: Callable[[str], None],
    stop: asyncio.Event | None,
) -> None:
    """Both loads, in turn first and last; in the first repeat the accuracy too."""
    first, *others = await replicas_of(target)
    load = _scaled(options.load, row.replicas)
    loads = {
        "direct": msgspec.structs.replace(load, target=first, others=tuple(others)),
        "through the gateway": msgspec.structs.replace(load, target=target),
    }
    fields: dict[str, dict[str, Any]] = {}
    for name in list(loads) if repeat % 2 == 0 else reversed(list(loads)):
        on_step(f"{row.replicas} replica(s), {name}")
        seeded = with_run_seed(loads[name], 2 * repeat + (name != "direct"))
        measured = await run(seeded, stop=stop)
        if measured.interrupted:
            raise InterruptedRunError
        if measured.fields["completed"] == 0:
            error = next(r.error for r in measured.records if r.error)
            raise UserError(f"{row.replicas} replica(s), {name}: no request succeeded: {error}")
        fields[name] = measured.fields
    row.direct.append(fields["direct"])
    row.runs.append(fields["through the gateway"])
    if repeat == 0:
        on_step(f"{row.replicas} replica(s), accuracy")
        row.accuracy = await unless_stopped(check_accuracy(options, target), stop)


def _scaled(load: BenchOptions, replicas: int) -> BenchOptions:
    """The load of one replica, for several."""
    count, streams = load.workload.count, load.max_concurrency
    return msgspec.structs.replace(
        load,
        workload=msgspec.structs.replace(load.workload, count=count and count * replicas),
        max_concurrency=streams and streams * replicas,
        num_warmups=load.num_warmups * replicas,
    )


async def replicas_of(gateway: Target) -> list[Target]:
    """The replicas that take requests. Raises UserError if no gateway answers there, or none of
    its replicas does."""
    rows = (await read_status(str(gateway)))["replicas"]
    up = [parse_url(row["url"]) for row in rows if row["state"] == "up"]
    if not up:
        raise UserError(f"{gateway}: this gateway has no replica that takes requests")
    return up


@asynccontextmanager
async def _gateway(
    options: ScalingOptions, replicas: int, url: str | None
) -> AsyncIterator[Target]:
    """The gateway at `url`, or a fleet with that many replicas, healthy; reaped at the end."""
    if url is not None:
        yield parse_url(url)
        return
    target = Target(_LOOPBACK, free_port(_LOOPBACK))
    fleet = {
        "command": [*options.serve_command, options.model, *options.serve_arguments],
        "replicas": replicas,
        "host": target.host,
        "port": target.port,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "fleet.yaml")
        file.write_bytes(msgspec.yaml.encode(fleet))
        command = [*MILLRACE, "fleet", "up", str(file)]
        process = ReplicaProcess(command, replica_threads(options.counts), lambda line: None)
        try:
            await start_and_wait_healthy(process, target, "the fleet", options.start_timeout)
            yield target
        finally:
            await process.stop(GRACE)


def gateway_fields(rows: Sequence[GatewayRow]) -> list[dict[str, Any]]:
    """The table as data: medians over repeats. Throughput in tok/s, latencies in ms, lost as a
    share of the direct throughput."""
    return [
        {
            "replicas": row.replicas,
            "users": row.figure("max_concurrent_requests"),
            "direct": row.of_direct("total_token_throughput"),
            "gateway": row.figure("total_token_throughput"),
            "lost": row.lost,
            **{f"direct_{name}": row.of_direct(name) for name in _LATENCIES},
            **{f"gateway_{name}": row.figure(name) for name in _LATENCIES},
            "failed": sum(run["failed"] for run in row.every_run),
            "accuracy": row.accuracy.value,
            "accuracy_items": row.accuracy.items,
            "accuracy_reason": row.accuracy.reason,
        }
        for row in rows
    ]


_LATENCIES = ("median_ttft_ms", "median_tpot_ms", "p99_itl_ms")
_HEADINGS = (
    *("replicas", "users", "direct tok/s", "gateway tok/s", "lost", "TTFT p50 ms", "TPOT p50 ms"),
    *("ITL p99 ms", "failed", "accuracy"),
)


def gateway_table(rows: Sequence[GatewayRow]) -> str:
    """The table as text (Markdown); latencies are direct / through the gateway."""
    cells: list[Sequence[str]] = [_HEADINGS]
    for row, fields in zip(rows, gateway_fields(rows), strict=True):
        cells.append(
            (
                str(row.replicas),
                f"{fields['users']:.0f}",
                f"{fields['direct']:,.0f}",
                f"{fields['gateway']:,.0f}",
                f"{fields['lost']:.1%}",
                *(
                    f"{fields[f'direct_{n}']:,.1f} / {fields[f'gateway_{n}']:,.1f}"
                    for n in _LATENCIES
                ),
                str(fields["failed"]),
                str(row.accuracy),
            )
        )
    reasons = sorted({row.accuracy.reason for row in rows if row.accuracy.reason})
    return "\n".join([*aligned(cells), *(f"accuracy n/a: {reason}" for reason in reasons)])


def _both(fields: dict[str, Any], name: str) -> str:
    return f"{fields[f'direct_{name}']:,.1f} / {fields[f'gateway_{name}']:,.1f}"
