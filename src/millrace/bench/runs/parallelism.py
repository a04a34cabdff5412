"""Which arrangement of one host's devices is best: TP x DP, each measured under the same load.

TP is the number of ranks that share a model, DP the number of replicas. Each arrangement is a
server of its own, started and reaped here, interleaved over repeats. An arrangement that cannot
start gets a row that says why.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from millrace.bench.load.interrupts import InterruptedRunError, unless_stopped
from millrace.bench.report.results import hit_text
from millrace.bench.report.tables import aligned
from millrace.bench.runs.accuracy import Accuracy
from millrace.bench.runs.options_from_flags import with_run_seed
from millrace.bench.runs.scaling import (
    ScalingOptions,
    ScalingRow,
    check_accuracy,
    scaling_fields,
    served,
)
from millrace.bench.runs.serve import run
from millrace.errors import UserError
from millrace.fleet.device_assignment import visible_gpus

MOST_CORES = 4  # cores of a host without GPUs that are tried as devices by default


class ParallelRow(ScalingRow, kw_only=True):
    """One arrangement. ranks: TP; replicas: DP. problem: why it could not be measured."""

    ranks: int
    problem: str | None = None

    @property
    def devices(self) -> int:
        return self.ranks * self.replicas

    @property
    def name(self) -> str:
        return f"{self.ranks}x{self.replicas}"


async def measure_parallelism(
    options: ScalingOptions,
    arrangements: Sequence[tuple[int, int]],
    on_step: Callable[[str], None],
    stop: asyncio.Event | None = None,
) -> list[ParallelRow]:
    """Measure every (TP, DP); on_step is called with a description of each step before it begins.
    `stop` ends it early: rows that were not measured have no runs.

    Raises UserError when no arrangement could be measured.
    """
    rows = [ParallelRow(ranks=tp, replicas=dp) for tp, dp in arrangements]
    options = msgspec.structs.replace(options, counts=[row.devices for row in rows])
    with contextlib.suppress(InterruptedRunError):
        for repeat in range(options.repeats):
            for row in rows:
                if row.problem is None:
                    on_step(f"TP x DP {row.name}, run {repeat + 1} of {options.repeats}")
                    await _measure_or_note(options, row, repeat, stop)
    if not any(row.runs for row in rows) and not (stop and stop.is_set()):
        raise UserError(f"no arrangement could be measured; {rows[0].name}: {rows[0].problem}")
    return rows


async def _measure_or_note(
    options: ScalingOptions, row: ParallelRow, repeat: int, stop: asyncio.Event | None
) -> None:
    """One run of an arrangement; its row says why where there is none."""
    try:
        await _measure(options, row, repeat, stop)
    except UserError as error:
        row.problem, row.runs = str(error), []
        row.accuracy = Accuracy(None, reason="not measured")


async def _measure(
    options: ScalingOptions, row: ParallelRow, repeat: int, stop: asyncio.Event | None
) -> None:
    arguments = ["--tensor-parallel-size", str(row.ranks)]
    async with served(options, row.replicas, arguments, stop) as target:
        load = with_run_seed(options.load, repeat)
        measured = await run(msgspec.structs.replace(load, target=target), stop=stop)
        if measured.fields["completed"] == 0:
            if measured.interrupted:
                raise InterruptedRunError
            first = next(record.error for record in measured.records if record.error)
            raise UserError(f"no request succeeded: {first}")
        row.runs.append(measured.fields)
        if len(row.runs) == 1:
            row.accuracy = await unless_stopped(check_accuracy(options, target), stop)


def parallelism_fields(rows: Sequence[ParallelRow]) -> list[dict[str, Any]]:
    """The table as data: that of `bench scaling` and more, without arrangements that failed.

    tokens_per_user: output tokens a second of one request, 1000 / median TPOT. efficiency:
    throughput per device, relative to that of the first row.
    """
    measured = [row for row in rows if row.runs]
    table = scaling_fields(measured) if measured else []
    for row, fields in zip(measured, table, strict=True):
        fields["tensor_parallel_size"] = row.ranks
        fields["devices"] = row.devices
        fields["per_device"] = fields["total_token_throughput"] / row.devices
        tpot = fields["median_tpot_ms"]
        fields["tokens_per_user"] = 1000.0 / tpot if tpot else 0.0
    for fields in table:
        base = table[0]["per_device"]
        fields["efficiency"] = fields["per_device"] / base if base else 0.0
    return table


_HEADINGS = ("TP x DP", "devices", "total tok/s", "a device", "tok/s a user", "TTFT ms", "TPOT ms",
             "prefix hits", "accuracy")  # fmt: skip


def parallelism_table(rows: Sequence[ParallelRow]) -> str:
    """The table as text (Markdown); latencies are mean / median / p99."""
    cells: list[Sequence[str]] = [_HEADINGS]
    table = parallelism_fields(rows)
    for row, fields in zip((row for row in rows if row.runs), table, strict=True):
        cells.append(
            (
                row.name,
                str(row.devices),
                f"{fields['total_token_throughput']:,.0f}",
                f"{fields['per_device']:,.0f}",
                f"{fields['tokens_per_user']:,.1f}",
                *(_latency(fields, name) for name in ("ttft", "tpot")),
                hit_text(row.hit_rate),
                str(row.accuracy),
            )
        )
    notes = [f"{row.name} n/a: {row.problem}" for row in rows if row.problem]
    reasons = {row.accuracy.reason for row in rows if row.runs and row.accuracy.reason}
    notes += [f"accuracy n/a: {reason}" for reason in sorted(reasons)]
    failed = sum(fields["failed"] for fields in table)
    notes += [f"{failed} requests failed"] if failed else []
    return "\n".join([*aligned(cells), *_answers(rows, table), *notes])


def _answers(rows: Sequence[ParallelRow], table: Sequence[dict[str, Any]]) -> list[str]:
    """The best arrangements for total throughput and for one user, of those with all devices."""
    most = max(fields["devices"] for fields in table)
    full = [fields for fields in table if fields["devices"] == most]
    name = "{tensor_parallel_size}x{replicas}"
    total = max(full, key=lambda fields: float(fields["total_token_throughput"]))
    user = max(full, key=lambda fields: float(fields["tokens_per_user"]))
    return [
        f"with {most} devices: highest total throughput with {name.format(**total)}, "
        f"fastest for one user with {name.format(**user)}"
    ]


def _latency(fields: dict[str, Any], name: str) -> str:
    figures = ("mean", "median", "p99")
    return " / ".join(f"{fields[f'{figure}_{name}_ms']:,.1f}" for figure in figures)


# --- arrangements -------------------------------------------------------------------------------


def all_arrangements(devices: int) -> list[tuple[int, int]]:
    """(TP, DP) in powers of two that need at most this many devices, small ones first."""
    powers = [2**n for n in range(devices.bit_length())]
    found = [(tp, dp) for tp in powers for dp in powers if tp * dp <= devices]
    return sorted(found, key=lambda pair: (pair[0] * pair[1], pair[0]))


def read_arrangements(text: str | None, devices: int) -> list[tuple[int, int]]:
    """Pairs from a text such as 1x1,2x1; all pairs for None. Raises UserError."""
    if text is None:
        return all_arrangements(devices)
    try:
        found = [(int(tp), int(dp)) for tp, dp in (one.split("x") for one in text.split(","))]
    except ValueError:
        found = []
    if not found or min(min(pair) for pair in found) < 1:
        raise UserError(f"--arrangements {text!r}: use TPxDP with counts from 1 on, as 1x1,1x2,2x1")
    if visible_gpus() and (most := max(tp * dp for tp, dp in found)) > devices:
        raise UserError(f"--arrangements {text!r} needs {most} GPUs; {devices} are visible")
    return found
