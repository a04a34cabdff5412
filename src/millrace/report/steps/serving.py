"""Servers of a report: started when a step needs one, kept for the next step that needs the same.

One server runs at a time, so that each has the whole device. Nothing is left running.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from millrace.bench.load.interrupts import unless_stopped
from millrace.common.http_client import Target
from millrace.common.sockets import free_port
from millrace.fleet.device_assignment import (
    replica_environments,
    thread_limit,
    usable_cores,
    visible_gpus,
)
from millrace.fleet.replica_process import ReplicaProcess, start_and_wait_healthy
from millrace.report.steps.step import Serving

_LOOPBACK = "127.0.0.1"
_GRACE = 30.0  # seconds that a server has to end
_MOST_LOG = 4 << 20  # characters of a log file


class Servers:
    """A context in which one server at a time runs. logs: a folder for what they write."""

    def __init__(self, logs: Path, limit: float, stop: asyncio.Event | None) -> None:
        self._logs, self._limit, self._stop = logs, limit, stop
        self._process: ReplicaProcess | None = None
        self._serving: Serving | None = None
        self._target = Target(_LOOPBACK, 0)

    async def __aenter__(self) -> Servers:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    async def get(self, serving: Serving) -> Target:
        """The address of this server, which is healthy.

        Raises UserError with its last lines if it does not start, and InterruptedRunError.
        """
        running = self._process is not None and self._process.running
        if not running or self._serving != serving:
            await self.start(serving)
        return self._target

    async def start(self, serving: Serving) -> float:
        """Start this server anew, in place of the one that runs; seconds until it was healthy."""
        await self.end()
        self._target = Target(_LOOPBACK, free_port(_LOOPBACK))
        self._process = process = ReplicaProcess(
            with_address(serving, self._target),
            {**device_environment(), **dict(serving.environment)},
            log_writer(self._logs / f"{serving.name}.log"),
        )
        began = time.monotonic()
        name = f"the server {serving.name!r}"
        starting = start_and_wait_healthy(process, self._target, name, self._limit)
        await unless_stopped(starting, self._stop)
        self._serving = serving
        return time.monotonic() - began

    def problem(self) -> str:
        """The last lines of a server that has ended by itself, for an error; empty for none."""
        if self._process is None or self._process.running:
            return ""
        return "; the server has ended: " + (" | ".join(self._process.last_lines) or "(nothing)")

    async def end(self) -> None:
        """End the server, if one runs, and reap it."""
        process, self._process, self._serving = self._process, None, None
        if process is not None:
            await process.stop(_GRACE)


def with_address(serving: Serving, target: Target) -> list[str]:
    """The command of a server at an address."""
    return [*serving.command, "--host", target.host, "--port", str(target.port)]


def device_environment() -> dict[str, str]:
    """The device of every server of a report: the first GPU, or all cores."""
    (environment,) = replica_environments(
        1, device="auto", gpus=visible_gpus(), cores=usable_cores(), threads=thread_limit()
    )
    return environment


def log_writer(path: Path) -> Callable[[str], None]:
    """A function that adds lines to a file, up to a bounded size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    left = _MOST_LOG

    def write(line: str) -> None:
        nonlocal left
        if left > 0:
            left -= len(line) + 1
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    return write
