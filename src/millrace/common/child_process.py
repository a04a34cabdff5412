"""Child processes: how they are started, how they end with their parent, and how they are reaped.

Every program that Millrace starts goes through these functions, so that none outlives its parent
and no wait for one is unbounded. The module does not know what the programs do.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

REAP_SECONDS = 5.0  # for a process that was killed; a driver that hangs can hold even that one
_PR_SET_PDEATHSIG = 1  # Linux, prctl(2)
# Loaded here: between fork and exec nothing may be loaded.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def python_module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module with this interpreter."""
    return [sys.executable, "-m", name, *arguments]


def child_environment(**variables: str) -> dict[str, str]:
    """The environment of a child: everything of this process, and `variables`."""
    return {**os.environ, **variables}


def end_with_parent(parent: int) -> None:
    """In a child: have the kernel kill this process as soon as process `parent` ends.

    Linux only. On other systems only a parent that has already ended is noticed. The kernel watches
    the thread that started the child, so a parent starts children in a thread that stays.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(1)


def stop_signals() -> list[signal.Signals]:
    """Signals that ask a service to stop in good order. SIGHUP is one of them, unless it is ignored
    as nohup has it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]


def kill_group(leader: int) -> None:
    """Kill every process of the group that `leader` leads. Raises nothing if there is none."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def reap(processes: Sequence[subprocess.Popen[Any]], limit: float, *, groups: bool = False) -> int:
    """Wait `limit` seconds for all of them to end, kill the others, and reap those too.

    groups: each process leads a group, which is killed with it. Returns how many were killed.
    """
    deadline = time.monotonic() + limit
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    late = [process for process in processes if process.returncode is None]
    for process in late:  # not reaped, so its number is still its own
        if groups:
            kill_group(process.pid)
        else:
            process.kill()
    for process in late:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(REAP_SECONDS)
    return len(late)


async def end_process(
    process: asyncio.subprocess.Process, *steps: tuple[float, signal.Signals]
) -> int | None:
    """Have a process end, and reap it. Each step: wait so many seconds, then send that signal.

    Returns the exit status; None if the process outlived the last signal by REAP_SECONDS.
    """
    for limit, number in steps:
        if await _ended(process, limit):
            return process.returncode
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
    await _ended(process, REAP_SECONDS)
    return process.returncode


async def kill_process(process: asyncio.subprocess.Process) -> int | None:
    """Kill a process now, unless it has ended, and reap it. Returns as `end_process`."""
    return await end_process(process, (0.0, signal.SIGKILL))


async def _ended(process: asyncio.subprocess.Process, limit: float) -> bool:
    if process.returncode is None and limit > 0:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), limit)
    return process.returncode is not None
