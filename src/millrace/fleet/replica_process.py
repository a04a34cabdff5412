"""One replica as a child process: started, its output read, and ended within a time limit.

It leads its own session, so that a Ctrl-C reaches only the supervisor, and it ends with the
supervisor in every case. What the command does is not known here.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from millrace.common.child_process import (
    child_environment,
    end_process,
    end_with_parent,
    kill_group,
)
from millrace.common.http_client import Target, fetch
from millrace.common.tasks import restarted
from millrace.errors import UserError

_LINE_LIMIT = 1 << 20


class ReplicaProcess:
    """A command under supervision.

    environment: added to that of this process. on_line is called with each line it writes, without
    its newline. last_lines: the latest of them, for error messages.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        on_line: Callable[[str], None],
    ) -> None:
        self.command = command
        self._environment = environment
        self._on_line = on_line
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self.last_lines: deque[str] = deque(maxlen=6)

    async def start(self) -> None:
        """Start it. Raises OSError if the command cannot be run."""
        parent = os.getpid()
        self.last_lines.clear()
        self._process = await asyncio.create_subprocess_exec(
            *self.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=child_environment(PYTHONUNBUFFERED="1", **self._environment),
            start_new_session=True,
            preexec_fn=lambda: end_with_parent(parent),
            limit=_LINE_LIMIT,
        )
        work = partial(self._read_output, self._process)
        self._reader = restarted(f"the output of {self.command[0]}", work, self._on_line)

    @property
    def started(self) -> bool:
        """Whether its command could be run, be it that it has ended since."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """Process id; only after `start`."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def wait(self) -> int:
        """Its exit status once it has ended and its last line was read; negative for a signal."""
        assert self._process is not None
        assert self._reader is not None
        status = await self._process.wait()
        # A grandchild may keep the pipe open; its lines are not read.
        await asyncio.wait([self._reader], timeout=1.0)
        self._reader.cancel()
        return status

    async def stop(self, timeout: float) -> None:
        """Ask it to end; kill its session after `timeout` seconds. Returns with it reaped."""
        if self._process is None:
            return
        await end_process(self._process, (0.0, signal.SIGTERM), (timeout, signal.SIGKILL))
        # Also after a clean end, so that nothing of its session is left.
        self.kill()
        await self.wait()

    def kill(self) -> None:
        """Kill it and all of its session, now."""
        if self._process is not None:
            kill_group(self._process.pid)

    async def _read_output(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # the line is longer than the limit and is dropped
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            self.last_lines.append(text)
            self._on_line(text)


async def start_and_wait_healthy(
    process: ReplicaProcess, target: Target, name: str, limit: float
) -> None:
    """Start it and return once GET /health at `target` says 200, within `limit` seconds.

    Raises UserError, with its last lines, if it cannot be run, ends, or takes too long; in the last
    case it still runs.
    """
    try:
        await process.start()
    except OSError as error:
        raise UserError(f"{name}: cannot run {process.command[0]!r} ({error})") from None
    ended = asyncio.create_task(process.wait())
    healthy = asyncio.create_task(_until_healthy(target))
    try:
        await asyncio.wait([ended, healthy], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if healthy.done():
            return
        problem = f"was not healthy within {limit:g} s"
        if ended.done():
            problem = f"ended with status {ended.result()} before it was healthy"
        last = " | ".join(process.last_lines) or "(nothing)"
        raise UserError(f"{name} {problem}; its last lines: {last}")
    finally:
        ended.cancel()
        healthy.cancel()


async def _until_healthy(target: Target) -> None:
    while True:
        try:
            if (await fetch(target, "/health", timeout=5.0)).status == 200:
                return
        except OSError:
            pass  # not listening yet
        await asyncio.sleep(0.1)
