"""Servers that are started on this host for a visit: one, or replicas behind a gateway."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from millrace.bench.load.interrupts import unless_stopped
from millrace.common.child_process import python_module
from millrace.common.http_client import Target
from millrace.common.sockets import free_port
from millrace.errors import UserError
from millrace.fleet.device_assignment import (
    replica_environments,
    thread_limit,
    usable_cores,
    visible_gpus,
)
from millrace.fleet.replica_process import ReplicaProcess, start_and_wait_healthy
from millrace.tune.servers.command_line import Served, engine_words, fleet_content
from millrace.tune.servers.running import MOST_LOG, RunningServer, StartError, Visits, not_healthy
from millrace.tune.space.knobs import replicas_of
from millrace.tune.trials.failures import Failure, LogReader
from millrace.tune.trials.outcome import Visit

_LOOPBACK = "127.0.0.1"
_GRACE = 30.0  # seconds that a server has to end


class LocalServers:
    """Servers that are started on this host: one, or replicas behind a gateway."""

    def __init__(self, served: Served, visits: Visits) -> None:
        self._served = served
        self._visits = visits

    @asynccontextmanager
    async def started(self, visit: Visit) -> AsyncIterator[RunningServer]:
        """The server of a visit, healthy; ended and reaped when the context ends."""
        server = RunningServer(Target(_LOOPBACK, free_port(_LOOPBACK)), LogReader())
        command, environment = self._command(visit, server.target)
        with _log_file(self._visits.logs, visit.number) as write:

            def on_line(line: str) -> None:
                server.reader.feed(line)
                write(line)

            write(f"$ {shlex.join(command)}")
            process = ReplicaProcess(command, environment, on_line)
            watching = None
            try:
                await self._wait_healthy(process, server)
                watching = asyncio.create_task(_watch(process, server))
                yield server
            finally:
                if watching is not None:
                    watching.cancel()
                await process.stop(_GRACE)

    def _command(self, visit: Visit, target: Target) -> tuple[list[str], Mapping[str, str]]:
        """The command of a visit, and more variables of its environment."""
        settings = visit.settings
        words = engine_words(self._served, self._visits.space, settings)
        if replicas_of(settings) == 1:
            taken = self._visits.space.devices_of(settings)
            (environment,) = replica_environments(
                1, device="auto", gpus=visible_gpus(), cores=usable_cores(),
                gpus_per_replica=taken, threads=thread_limit(),
            )  # fmt: skip
            return [*words, "--host", target.host, "--port", str(target.port)], environment
        content = fleet_content(words, self._visits.space, settings, target.port)
        path = self._visits.logs / f"fleet-{visit.number:03}.yaml"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(content)))  # JSON is YAML
        return [*python_module("millrace.cli", "fleet", "up"), str(path)], {}

    async def _wait_healthy(self, process: ReplicaProcess, server: RunningServer) -> None:
        limit = self._visits.start_limit
        starting = start_and_wait_healthy(process, server.target, "the server", limit)
        try:
            await unless_stopped(starting, self._visits.stop)
        except UserError as error:
            if process.running:
                raise StartError(not_healthy(server.reader, limit)) from None
            if not process.started:
                raise StartError(Failure("crash", "start", str(error))) from None
            status = await process.wait()
            raise StartError(server.reader.failure("start", status)) from None


async def _watch(process: ReplicaProcess, server: RunningServer) -> None:
    server.status = await process.wait()
    server.ended.set()


@contextmanager
def _log_file(folder: Path, number: int) -> Iterator[Callable[[str], None]]:
    """Writes lines to the file of a visit, up to a bounded size."""
    folder.mkdir(parents=True, exist_ok=True)
    left = MOST_LOG
    with (folder / f"visit-{number:03}.log").open("a", encoding="utf-8") as file:

        def write(line: str) -> None:
            nonlocal left
            if left > 0 and not file.closed:
                file.write(line[:left] + "\n")
                left -= len(line) + 1

        yield write
