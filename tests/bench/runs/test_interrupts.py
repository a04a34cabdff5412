"""Signals at any time: what was measured is written, and nothing hangs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from millrace.bench.load.interrupts import InterruptedRunError, Interrupts, unless_stopped
from tests.support.mock_replica import MockReplica
from tests.support.running import run

SMALL = ("--random-input-len", "4", "--random-output-len", "4", "--max-concurrency", "2")


async def signalled(
    command: list[str], number: int, when: Callable[[], bool]
) -> tuple[int | None, str, str]:
    """Status, stdout and stderr of a bench command that gets a signal once `when` holds."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "millrace.cli", "bench", *command),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            while not when() and process.returncode is None:
                await asyncio.sleep(0.01)
            process.send_signal(number)
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, output.decode(), errors.decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_early_is_written(tmp_path: Path, number: int) -> None:
    async def scenario() -> tuple[int | None, str, str]:
        replica = await MockReplica(first_s=0.05).start()
        command = ["serve", "--base-url", replica.url, "--duration", "50", *SMALL]
        command += ["--result-dir", str(tmp_path), "--result-filename", "r.json"]
        ended = await signalled(command, number, lambda: len(replica.bodies) > 8)
        await replica.stop()
        return ended

    status, output, _ = run(scenario())
    assert status == 128 + number
    got = json.loads((tmp_path / "r.json").read_text())
    assert got["completed"] >= 5
    assert got["interrupted"] is True
    assert "Successful requests:" in output


@pytest.mark.parametrize("behaviour", ["hang", "unhealthy", "absent"])
def test_a_signal_before_the_run_ends_it_at_once(behaviour: str) -> None:
    """While it waits for a server, or for the first answer."""

    async def scenario() -> tuple[int | None, str, float]:
        replica = await MockReplica(
            behaviour="hang" if behaviour == "hang" else "ok", healthy=behaviour == "hang"
        ).start()
        url = replica.url
        seen: list[float] = []
        if behaviour == "absent":
            await replica.stop()
        loop = asyncio.get_running_loop()
        begun = loop.time()

        def ready() -> bool:
            if replica.bodies or (behaviour != "hang" and loop.time() > begun + 2.0):
                seen.append(loop.time())
            return bool(seen)

        command = ["serve", "--base-url", url, "--ready-check-timeout-sec", "100", *SMALL]
        status, _, errors = await signalled(command, signal.SIGINT, ready)
        took = loop.time() - seen[0]
        if behaviour != "absent":
            await replica.stop()
        return status, errors, took

    status, errors, took = run(scenario())
    assert status == 130
    assert errors.strip().endswith("interrupted before the run began: nothing was measured")
    assert took < 5


def test_a_sweep_that_is_ended_early_prints_the_points_that_were_measured(tmp_path: Path) -> None:
    async def scenario() -> tuple[int | None, str, str]:
        replica = await MockReplica(first_s=0.05).start()
        command = ["sweep", "--base-url", replica.url, "--over", "num-prompts=4,500", *SMALL]
        ended = await signalled(command, signal.SIGTERM, lambda: len(replica.bodies) > 12)
        await replica.stop()
        return ended

    status, output, _ = run(scenario())
    assert status == 143
    table, _, rest = output.partition("\n\n")
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert "failed" in rest  # the other columns


def test_an_evaluation_is_ended_and_the_run_before_it_is_kept(tmp_path: Path) -> None:
    async def scenario() -> tuple[int | None, str, str]:
        replica = await MockReplica().start()
        command = ["serve", "--base-url", replica.url, "--num-prompts", "4", *SMALL]
        command += ["--accuracy", "math", "--result-dir", str(tmp_path)]
        command += ["--result-filename", "r.json"]

        def evaluating() -> bool:
            if len(replica.bodies) >= 5:
                replica.behaviour = "hang"
            return any("messages" in body for body in replica.bodies)

        ended = await signalled(command, signal.SIGINT, evaluating)
        await replica.stop()
        return ended

    status, _, _ = run(scenario())
    assert status == 130
    assert json.loads((tmp_path / "r.json").read_text())["completed"] == 4


# --- the parts ---------------------------------------------------------------------------------


def test_work_is_cancelled_when_the_stop_comes_first() -> None:
    ended: list[str] = []

    async def work() -> int:
        try:
            await asyncio.sleep(30)
        finally:
            ended.append("cancelled")
        return 1

    async def scenario() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.01, stop.set)
        with pytest.raises(InterruptedRunError):
            await unless_stopped(work(), stop)

    run(scenario())
    assert ended == ["cancelled"]


def test_the_result_and_the_error_of_work_are_its_own() -> None:
    async def good() -> int:
        return 1

    async def bad() -> int:
        raise OSError("gone")

    async def scenario() -> None:
        assert await unless_stopped(good(), None) == 1
        assert await unless_stopped(good(), asyncio.Event()) == 1
        with pytest.raises(OSError, match="gone"):
            await unless_stopped(bad(), asyncio.Event())

    run(scenario())


def test_a_signal_between_two_loops_is_noted_and_ends_the_next_one() -> None:
    async def main(stop: asyncio.Event) -> bool:
        return stop.is_set()

    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        assert interrupts.run(main) is False
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.run(main) is True
        assert interrupts.status == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_that_a_shell_ignores_for_background_commands_are_heeded() -> None:
    before = [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGHUP)]
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.number is None  # under nohup
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.number == signal.SIGINT
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)


def test_a_signal_in_a_loop_sets_the_event() -> None:
    async def main(stop: asyncio.Event) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(10):
            return await stop.wait()

    with Interrupts() as interrupts:
        assert interrupts.run(main) is True
        assert interrupts.number == signal.SIGHUP
