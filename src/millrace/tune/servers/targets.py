"""What is tuned: servers that are started here, or a running one with a command that restarts it.

Every visit starts a server with its settings, loads it, and ends it; what it writes is read for the
causes of failures, and kept in a file.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import msgspec

from millrace.bench.load.interrupts import unless_stopped
from millrace.common.child_process import child_environment, kill_process, python_module
from millrace.common.http_client import Target, fetch
from millrace.common.sockets import free_port
from millrace.errors import UserError
from millrace.fleet.device_assignment import (
    replica_environments,
    thread_limit,
    usable_cores,
    visible_gpus,
)
from millrace.fleet.replica_process import ReplicaProcess, start_and_wait_healthy
from millrace.tune.servers.command_line import (
    Served,
    engine_words,
    flags_of,
    fleet_content,
)
from millrace.tune.servers.load import HungError, LoadPlan, check_accuracy, run_load
from millrace.tune.space.knobs import Settings, Space, Value, replicas_of
from millrace.tune.trials.failures import Failure, LogReader, failed_request
from millrace.tune.trials.outcome import Outcome, Run, Visit

_LOOPBACK = "127.0.0.1"
_GRACE = 30.0  # seconds that a server has to end
_MOST_LOG = 4 << 20  # characters of a log file


class Visits(msgspec.Struct, frozen=True, kw_only=True):
    """What the visits of a study have in common. start_limit: seconds until a server must be
    healthy. logs: folder of the servers' output. stop: ends the visit that is under way."""

    space: Space
    plan: LoadPlan
    start_limit: float = 900.0
    logs: Path
    stop: asyncio.Event | None = None


class RunningServer:
    """A server of a visit: where it is, what it wrote, whether it has ended."""

    def __init__(self, target: Target, reader: LogReader) -> None:
        self.target = target
        self.reader = reader
        self.ended = asyncio.Event()
        self.status: int | None = None


class StartError(Exception):
    """A server did not start. failure: why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


class _Servers:
    """How a visit goes, whatever kind of server it is to."""

    def __init__(self, visits: Visits) -> None:
        self._visits = visits

    def started(self, visit: Visit) -> Any:
        """A context with a RunningServer. Raises StartError on entry."""
        raise NotImplementedError

    async def visit(self, visit: Visit) -> Outcome:
        """As TuningTarget.visit. Raises InterruptedRunError when the study is stopped."""
        began = time.monotonic()
        runs: list[Run] = []
        try:
            async with self.started(visit) as server:
                ready = time.monotonic() - began
                failure = await self._loads(visit, server, runs)
                found = None
                if failure is None and visit.accuracy:
                    plan, stop = self._visits.plan, self._visits.stop
                    found = await check_accuracy(plan, server.target, stop)
        except StartError as error:
            return Outcome(failure=error.failure, seconds=time.monotonic() - began)
        return Outcome(
            runs=tuple(runs),
            failure=failure,
            accuracy=found.value if found else None,
            items=found.items if found else 0,
            seconds=time.monotonic() - began,
            start_seconds=ready,
        )

    async def _loads(self, visit: Visit, server: RunningServer, runs: list[Run]) -> Failure | None:
        """A load for each seed; the failure that ended them, if one did."""
        plan = self._visits.plan
        for seed, streams in zip(visit.seeds, visit.streams or repeat(0), strict=False):
            load = plan.options(server.target, seed, short=visit.purpose != "full", streams=streams)
            try:
                runs.append(await run_load(plan, load, stop=self._visits.stop, ended=server.ended))
            except HungError as error:
                return Failure("hang", "run", str(error))
            except UserError as error:
                if not server.ended.is_set() and not server.reader.seen:
                    return failed_request(str(error))
                return server.reader.failure("run", server.status)
            if server.ended.is_set() or (runs[-1].failed and server.reader.seen):
                return server.reader.failure("run", server.status)
        return None


class LocalServers(_Servers):
    """Servers that are started on this host: one, or replicas behind a gateway."""

    def __init__(self, served: Served, visits: Visits) -> None:
        super().__init__(visits)
        self._served = served

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
            if process.running and not server.reader.seen:
                failure = Failure("hang", "start", f"it was not healthy within {limit:g} s")
                raise StartError(failure) from None
            status = await process.wait() if not process.running else None
            if status is None and not server.reader.seen:
                raise StartError(Failure("crash", "start", str(error))) from None
            raise StartError(server.reader.failure("start", status)) from None


async def _watch(process: ReplicaProcess, server: RunningServer) -> None:
    server.status = await process.wait()
    server.ended.set()


@contextmanager
def _log_file(folder: Path, number: int) -> Iterator[Callable[[str], None]]:
    """Writes lines to the file of a visit, up to a bounded size."""
    folder.mkdir(parents=True, exist_ok=True)
    left = _MOST_LOG
    with (folder / f"visit-{number:03}.log").open("a", encoding="utf-8") as file:

        def write(line: str) -> None:
            nonlocal left
            if left > 0 and not file.closed:
                file.write(line[:left] + "\n")
                left -= len(line) + 1

        yield write


# --- a server that runs already -------------------------------------------------------------------


class Restart(msgspec.Struct, frozen=True, kw_only=True):
    """How a running server gets other settings. command: `{flags}` in it becomes the flags; they
    are in MILLRACE_TUNE_FLAGS too. It returns when the server was told to restart. log: a file that
    the server writes, if there is one."""

    command: str
    target: Target
    log: Path | None = None


class RestartedServer(_Servers):
    """A server somewhere, which a command of the user restarts with other flags."""

    def __init__(self, restart: Restart, visits: Visits) -> None:
        super().__init__(visits)
        self._restart = restart

    @asynccontextmanager
    async def started(self, visit: Visit) -> AsyncIterator[RunningServer]:
        """The server of a visit, restarted and healthy. It is left running at the end."""
        server = RunningServer(self._restart.target, LogReader())
        begin = _size(self._restart.log)
        limit, stop = self._visits.start_limit, self._visits.stop
        status = await unless_stopped(self._run_command(visit.settings, server), stop)
        if status:
            self._read_log(server, begin)
            raise StartError(server.reader.failure("start", status))
        if not await unless_stopped(_healthy(server.target, limit), stop):
            self._read_log(server, begin)
            if server.reader.seen:
                raise StartError(server.reader.failure("start"))
            line = f"it was not healthy within {limit:g} s"
            raise StartError(Failure("hang", "start", line))
        tail = asyncio.create_task(self._follow_log(server, begin))
        try:
            yield server
        finally:
            tail.cancel()

    async def _run_command(self, settings: Settings, server: RunningServer) -> int:
        """Run the user's command; its exit status, and what it wrote goes to the reader."""
        flags = shlex.join(flags_of(self._visits.space, settings))
        process = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", self._restart.command.replace("{flags}", flags)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=child_environment(MILLRACE_TUNE_FLAGS=flags, **_variables(settings)),
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), self._visits.start_limit)
        except TimeoutError:
            server.reader.feed(f"--restart-command took longer than {self._visits.start_limit:g} s")
            return 1
        finally:
            await kill_process(process)
        for line in output.decode("utf-8", "replace").splitlines():
            server.reader.feed(line)
        return process.returncode or 0

    async def _follow_log(self, server: RunningServer, begin: int) -> None:
        while True:
            begin = self._read_log(server, begin)
            await asyncio.sleep(1.0)

    def _read_log(self, server: RunningServer, begin: int) -> int:
        """Feed what the log has behind an offset; the new offset. A cut log begins anew."""
        path = self._restart.log
        if path is None:
            return 0
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(begin if begin <= size else 0)
                data = file.read(_MOST_LOG)
                end = file.tell()
        except OSError:
            return begin
        for line in data.decode("utf-8", "replace").splitlines():
            server.reader.feed(line)
        return end


def _variables(settings: Mapping[str, Value]) -> dict[str, str]:
    """Each knob as a variable: MILLRACE_TUNE_MAX_NUM_SEQS."""
    return {
        f"MILLRACE_TUNE_{name.upper()}": str(value)
        for name, value in settings.items()
        if value is not None
    }


def _size(path: Path | None) -> int:
    try:
        return path.stat().st_size if path is not None else 0
    except OSError:
        return 0


async def _healthy(target: Target, limit: float) -> bool:
    """Whether GET /health says 200 within a limit."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        try:
            if (await fetch(target, "/health", timeout=5.0)).status == 200:
                return True
        except OSError:
            pass
        await asyncio.sleep(0.2)
    return False
