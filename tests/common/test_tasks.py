"""Background tasks that fail: reported, counted, started again."""

from __future__ import annotations

import asyncio
import gc

from millrace.common.backoff import BackoffPolicy
from millrace.common.tasks import reported, restarted, task_failures
from tests.support.running import eventually, run

AT_ONCE = BackoffPolicy(first=0.0)


def test_work_that_raises_is_reported_and_starts_again() -> None:
    async def scenario() -> None:
        lines: list[str] = []
        runs = 0

        async def work() -> None:
            nonlocal runs
            runs += 1
            if runs < 3:
                raise ValueError(f"run {runs}")

        before = task_failures()
        await restarted("the sweep", work, lines.append, AT_ONCE)
        assert (runs, task_failures() - before) == (3, 2)
        assert lines[0].startswith("the sweep failed (ValueError: run 1 at ")
        assert "it starts again in" in lines[1]

    run(scenario())


def test_a_log_that_raises_does_not_end_the_work() -> None:
    async def scenario() -> None:
        runs = 0

        async def work() -> None:
            nonlocal runs
            runs += 1
            if runs < 3:
                raise ValueError

        def broken(line: str) -> None:
            raise OSError("no space")

        await restarted("x", work, broken, AT_ONCE)
        assert runs == 3

    run(scenario())


def test_cancelled_work_stays_cancelled() -> None:
    async def scenario() -> None:
        lines: list[str] = []
        task = restarted("x", lambda: asyncio.sleep(60), lines.append)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert lines == []

    run(scenario())


def test_the_owner_learns_of_a_failure_once() -> None:
    async def scenario() -> None:
        lines: list[str] = []
        errors: list[Exception] = []

        async def work() -> None:
            await asyncio.sleep(0)
            raise KeyError("gone")

        reported("the reader", work(), lines.append, errors.append)
        gc.collect()  # nothing but the module holds the task
        await eventually(lambda: errors)
        assert isinstance(errors[0], KeyError)
        assert len(lines) == 1

    run(scenario())
