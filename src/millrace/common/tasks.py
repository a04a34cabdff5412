"""Background tasks that cannot die unnoticed.

A task of an event loop that raises is silently gone. Here every failure is reported in one line and
counted, and the work is started again after a delay, or its end is handed to the owner. What the
work does is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

from millrace.common.backoff import Backoff, BackoffPolicy

Log = Callable[[str], None]
Work = Callable[[], Coroutine[Any, Any, None]]

RESTARTS = BackoffPolicy(first=0.1, longest=10.0, settled=30.0)
_running: set[asyncio.Task[None]] = set()  # the event loop itself keeps only weak references
_failures = 0


def task_failures() -> int:
    """Failures of background tasks in this process."""
    return _failures


def restarted(
    name: str, work: Work, log: Log, policy: BackoffPolicy = RESTARTS
) -> asyncio.Task[None]:
    """A task that runs `work`, and runs it again after a delay whenever it raises.

    It ends when `work` returns or the task is cancelled.
    """
    return _start(_restart(name, work, log, Backoff(policy)))


def reported(
    name: str,
    work: Coroutine[Any, Any, None],
    log: Log,
    on_failure: Callable[[Exception], None] = lambda error: None,
) -> asyncio.Task[None]:
    """A task whose failure is reported, and handed to `on_failure`. It is not restarted."""
    return _start(_report(name, work, log, on_failure))


def describe(error: BaseException) -> str:
    """One line for an unexpected exception: type, message, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}{place}".split())[:1000]


def _start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.get_running_loop().create_task(work)
    _running.add(task)
    task.add_done_callback(_running.discard)
    return task


async def _restart(name: str, work: Work, log: Log, backoff: Backoff) -> None:
    while True:
        began = time.monotonic()
        try:
            await work()
            return
        except Exception as error:
            delay = backoff.failed(time.monotonic() - began)
            _count(log, f"{name} failed ({describe(error)}); it starts again in {delay:g} s")
        await asyncio.sleep(delay)


async def _report(
    name: str,
    work: Coroutine[Any, Any, None],
    log: Log,
    on_failure: Callable[[Exception], None],
) -> None:
    try:
        await work
    except Exception as error:
        _count(log, f"{name} failed ({describe(error)})")
        on_failure(error)


def _count(log: Log, line: str) -> None:
    global _failures
    _failures += 1
    with contextlib.suppress(Exception):  # the work matters more than the line
        log(line)
