"""An engine as a child process: started, watched, and ended within a time limit.

It has its own session, so a Ctrl-C at the terminal reaches the server alone, which then ends the
engine in order. In turn, the engine ends when the process named by --parent-pid does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec

from millrace.common.child_process import end_process, python_module
from millrace.config import EngineArgs

ENGINE_PROGRAM = tuple(python_module("millrace.replica.process"))

ASKED_SECONDS = 5.0  # for an engine that was asked to end, by message
TERMINATED_SECONDS = 3.0  # for one that was sent SIGTERM


class EngineProcess:
    """One running engine program."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(
        cls, args: EngineArgs, sockets: Path, program: Sequence[str] = ENGINE_PROGRAM
    ) -> EngineProcess:
        """Start `program` with these arguments; it will connect to the sockets in `sockets`."""
        process = await asyncio.create_subprocess_exec(
            *program,
            *("--args", msgspec.json.encode(args).decode()),
            *("--socket-dir", str(sockets)),
            *("--parent-pid", str(os.getpid())),
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self) -> int:
        """Exit status, once it has ended."""
        return await self._process.wait()

    async def end(self) -> None:
        """Wait for an engine that was asked to end; then insist. Returns with the process gone."""
        asked, terminated = (ASKED_SECONDS, signal.SIGTERM), (TERMINATED_SECONDS, signal.SIGKILL)
        await end_process(self._process, asked, terminated)
