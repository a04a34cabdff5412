"""Accuracy: `millrace eval`, run against the server that is measured.

The evaluation is known by its command line and its JSON file alone.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from millrace.bench.load.interrupts import InterruptedRunError, unless_stopped
from millrace.bench.load.options import BenchOptions
from millrace.bench.runs.serve import background_load
from millrace.common.child_process import kill_process, python_module

EVALUATION = tuple(python_module("millrace.cli", "eval"))
_MAX_REQUESTS = 8  # evaluation requests in flight at once


class Accuracy(msgspec.Struct, frozen=True):
    """value: share of items with a correct answer; None where there is none, with the reason."""

    value: float | None
    items: int = 0
    reason: str | None = None

    def __str__(self) -> str:
        return "n/a" if self.value is None else f"{self.value:.1%}"


async def accuracy_under_load(
    options: BenchOptions,
    tasks: Sequence[str],
    items: int,
    stop: asyncio.Event | None = None,
    *,
    command: Sequence[str] = EVALUATION,
    limit: float = 1800.0,
) -> dict[str, Accuracy]:
    """Accuracy by task, measured under the same kind of load: the evaluation takes a part of the
    concurrency, and the load keeps the rest. `stop` ends it early."""
    concurrency = options.max_concurrency
    own = max(1, min(_MAX_REQUESTS, concurrency // 4)) if concurrency else _MAX_REQUESTS
    rest = None if concurrency is None else concurrency - own
    found: dict[str, Accuracy] = {}
    over = asyncio.Event()
    load = None
    if rest is None or rest > 0:
        remaining = msgspec.structs.replace(options, max_concurrency=rest)
        load = asyncio.create_task(background_load(remaining, over))
    try:
        for task in tasks:
            if stop is not None and stop.is_set():
                break
            measuring = measure_accuracy(
                str(options.target),
                command=command,
                task=task,
                items=items,
                limit=limit,
                options=_eval_options(options, own),
            )
            found[task] = await unless_stopped(measuring, stop)
    except InterruptedRunError:
        pass  # the tasks that are done are kept
    finally:
        over.set()
        if load is not None:
            await asyncio.gather(load, return_exceptions=True)
    return found


def _eval_options(options: BenchOptions, concurrency: int) -> list[str]:
    chosen = ["--concurrency", str(concurrency)]
    return [*chosen, "--served-model-name", options.model] if options.model else chosen


def accuracy_fields(found: Mapping[str, Accuracy]) -> dict[str, dict[str, Any]]:
    """Accuracy by task, for the result file."""
    return {
        task: {
            "value": one.value,
            "items": one.items,
            "reason": one.reason,
            "text": f"{one} of {one.items}" if one.value is not None else f"n/a ({one.reason})",
        }
        for task, one in found.items()
    }


async def measure_accuracy(
    url: str,
    *,
    command: Sequence[str],
    task: str,
    items: int,
    limit: float,
    options: Sequence[str] = (),
) -> Accuracy:
    """Run the evaluation on the server at `url`; limit: seconds it may take; options: further flags
    of it. A failure becomes an Accuracy without a value."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "accuracy.json"
        process = await asyncio.create_subprocess_exec(
            *(*command, "--base-url", url),
            *("--tasks", task, "--num-items", str(items), "--json", str(file)),
            *options,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, errors = await asyncio.wait_for(process.communicate(), limit)
        except TimeoutError:
            return Accuracy(None, reason=f"the evaluation took longer than {limit:g} s")
        finally:
            await kill_process(process)
        if process.returncode or not file.exists():
            lines = errors.decode("utf-8", "replace").strip().splitlines()
            return Accuracy(None, reason=lines[-1] if lines else "the evaluation failed")
        return read_accuracy(file.read_bytes(), task)


class _Count(msgspec.Struct):
    accuracy: float
    total: int


class _Task(msgspec.Struct):
    items: _Count
    errors: int = 0


class _Report(msgspec.Struct):
    summary: dict[str, _Task]


def read_accuracy(report: bytes, task: str) -> Accuracy:
    """The accuracy of one task in the evaluation's JSON file. Items without an answer count as
    wrong; when no item got an answer, there is no accuracy."""
    try:
        found = msgspec.json.decode(report, type=_Report).summary.get(task)
    except msgspec.DecodeError as error:
        return Accuracy(None, reason=f"the evaluation's file cannot be read ({error})")
    if found is None:
        return Accuracy(None, reason=f"the evaluation's file has no task {task!r}")
    if found.errors >= found.items.total:
        return Accuracy(None, reason=f"none of {found.items.total} items got an answer")
    return Accuracy(found.items.accuracy, found.items.total)
