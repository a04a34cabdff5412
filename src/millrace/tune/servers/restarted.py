"""A server that runs somewhere, which a command of the user restarts with other flags."""

from __future__ import annotations

import asyncio
import os
import shlex
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from millrace.bench.load.interrupts import unless_stopped
from millrace.common.child_process import child_environment, kill_process
from millrace.common.http_client import Target, fetch
from millrace.tune.servers.command_line import flags_of
from millrace.tune.servers.running import MOST_LOG, RunningServer, StartError, Visits, not_healthy
from millrace.tune.space.knobs import Settings, Value
from millrace.tune.trials.failures import LogReader
from millrace.tune.trials.outcome import Visit

_FOLLOW = 0.5  # seconds between two looks at a log
_DOOMED = 2.0  # seconds in which a server may still be healthy whose log says that it failed


class Restart(msgspec.Struct, frozen=True, kw_only=True):
    """How a running server gets other settings. command: `{flags}` in it becomes the flags; they
    are in MILLRACE_TUNE_FLAGS too. It returns when the server was told to restart. log: a file that
    the server writes, if there is one."""

    command: str
    target: Target
    log: Path | None = None


class RestartedServer:
    """A server somewhere, which a command of the user restarts with other flags."""

    def __init__(self, restart: Restart, visits: Visits) -> None:
        self._restart = restart
        self._visits = visits

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
        tail = asyncio.create_task(self._follow_log(server, begin))
        try:
            if not await unless_stopped(_healthy(server, limit), stop):
                raise StartError(not_healthy(server.reader, limit))
            yield server
        finally:
            tail.cancel()

    async def _run_command(self, settings: Settings, server: RunningServer) -> int:
        """Run the user's command; its exit status, and what it wrote goes to the reader."""
        flags = shlex.join(flags_of(self._visits.space, settings))
        limit = self._visits.start_limit
        # A file and no pipe: a server that the command leaves behind may keep its output open.
        with tempfile.TemporaryFile() as output:
            process = await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", self._restart.command.replace("{flags}", flags)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                env=child_environment(MILLRACE_TUNE_FLAGS=flags, **_variables(settings)),
            )
            try:
                status = await asyncio.wait_for(process.wait(), limit)
            except TimeoutError:
                server.reader.feed(f"--restart-command took longer than {limit:g} s")
                return 1
            finally:
                await kill_process(process)
            output.seek(0)
            for line in output.read(MOST_LOG).decode("utf-8", "replace").splitlines():
                server.reader.feed(line)
        return status

    async def _follow_log(self, server: RunningServer, begin: int) -> None:
        while True:
            begin = self._read_log(server, begin)
            await asyncio.sleep(_FOLLOW)

    def _read_log(self, server: RunningServer, begin: int) -> int:
        """Feed what the log has behind an offset; the new offset. A cut log begins anew."""
        path = self._restart.log
        if path is None:
            return 0
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(begin if begin <= size else 0)
                data = file.read(MOST_LOG)
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


async def _healthy(server: RunningServer, limit: float) -> bool:
    """Whether GET /health says 200 within a limit; sooner no, where the log says why not."""
    deadline = time.monotonic() + limit
    while (now := time.monotonic()) < deadline:
        try:
            if (await fetch(server.target, "/health", timeout=5.0)).status == 200:
                return True
        except OSError:
            pass
        if server.reader.seen:
            deadline = min(deadline, now + _DOOMED)
        await asyncio.sleep(0.2)
    return False
