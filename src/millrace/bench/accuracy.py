"""Accuracy beside speed: the evaluation command, run against the server that is measured.

It knows the evaluation by its command line and the JSON file it writes, nothing more.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec


class Accuracy(msgspec.Struct, frozen=True):
    """value: share of items answered correctly, None where there is none, with the reason."""

    value: float | None
    items: int = 0
    reason: str | None = None

    def __str__(self) -> str:
        return "n/a" if self.value is None else f"{self.value:.1%}"


async def measure_accuracy(
    url: str, *, command: Sequence[str], task: str, items: int, limit: float
) -> Accuracy:
    """Run the evaluation on the server at `url`; limit: seconds it may take. What fails becomes
    an Accuracy without a value."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "accuracy.json"
        process = await asyncio.create_subprocess_exec(
            *(*command, "--base-url", url),
            *("--tasks", task, "--num-items", str(items), "--json", str(file)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, errors = await asyncio.wait_for(process.communicate(), limit)
        except TimeoutError:
            return Accuracy(None, reason=f"the evaluation took longer than {limit:g} s")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
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
    """The accuracy of one task out of the evaluation's JSON file. Items that got no answer count
    as wrong, as they do there; when none got one, there is no accuracy."""
    try:
        found = msgspec.json.decode(report, type=_Report).summary.get(task)
    except msgspec.DecodeError as error:
        return Accuracy(None, reason=f"the evaluation's file cannot be read ({error})")
    if found is None:
        return Accuracy(None, reason=f"the evaluation's file has no task {task!r}")
    if found.errors >= found.items.total:
        return Accuracy(None, reason=f"none of {found.items.total} items got an answer")
    return Accuracy(found.items.accuracy, found.items.total)
