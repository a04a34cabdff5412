"""A start of two ranks in which one fails: the other says so within seconds, whatever it is in."""

from __future__ import annotations

import ctypes
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from millrace.errors import RankError
from millrace.replica import hang_guard, rank_launcher
from millrace.replica.hang_guard import HangGuard
from millrace.runtime.ranks import heartbeat
from millrace.runtime.ranks.interruptible import kill_process_after, run_interruptibly
from millrace.runtime.ranks.ranks import Ranks
from tests.support.child_environment import ROOT, child_environment, python_path
from tests.support.engines import build
from tests.support.failing_rank import STAGES, WAYS, as_on_a_gpu

NOTICED = 10.0  # seconds from the failure until rank 0 has raised; it takes about one
LIMIT = 30.0
LINES = {
    "kill": r"rank 1 \(pid \d+\) died with signal 9",
    "stop": r"rank 1 \(pid \d+\) has not answered for \d+ s and is stopped",
    "raise": r"rank 1 (\(pid \d+\) ends|could not join): out of luck",
}
# Each way once, early, amid and late; `make sweep` has all of them at every stage.
SOME = [("groups", "kill"), ("weights", "raise"), ("first step", "stop")]
EVERY = [
    pytest.param(stage, way, marks=[] if (stage, way) in SOME else pytest.mark.sweep)
    for stage in STAGES
    for way in WAYS
]


def start_failing_ranks(
    monkeypatch: pytest.MonkeyPatch, stage: str, way: str, note: Path
) -> list[subprocess.Popen[bytes]]:
    """Have rank 0 start a rank that fails; the processes are in the list once it has."""
    started: list[subprocess.Popen[bytes]] = []

    def popen(command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        at = command.index("millrace.replica.process")
        failing = ["tests.support.failing_rank", stage, way, str(note)]
        command = [*command[:at], *failing, *command[at + 1 :]]
        started.append(subprocess.Popen(command, env={**env, "PYTHONPATH": python_path()}))
        return started[-1]

    one = SimpleNamespace(Popen=popen, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(rank_launcher, "subprocess", one)
    return started


@pytest.mark.parametrize(("stage", "way"), EVERY)
def test_a_rank_that_fails_is_named(
    stage: str, way: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "STOPPED_LIMIT", 1.0)
    monkeypatch.setenv("MILLRACE_SKIP_ALL_REDUCE", "gloo one-shot")
    note = tmp_path / "failed"
    started = start_failing_ranks(monkeypatch, stage, way, note)
    as_on_a_gpu(monkeypatch.setattr)
    with pytest.raises(RankError) as error:
        build(tiny_model, tensor_parallel_size=2)
    spent = time.time() - float(note.read_text())
    assert re.fullmatch(LINES[way], str(error.value))
    assert spent < NOTICED
    assert not psutil.pid_exists(started[0].pid)


STUCK = """
import sys, threading
from pathlib import Path
import pytest
from tests.runtime.ranks.test_starts import start_failing_ranks
from tests.support.engines import build
from millrace.runtime import worker
worker.load_model = lambda *given: threading.Event().wait()
with pytest.MonkeyPatch.context() as patch:
    start_failing_ranks(patch, "weights", "kill", Path(sys.argv[2]))
    build(sys.argv[1], tensor_parallel_size=2)
"""


def test_a_process_that_cannot_notice_is_ended(tiny_model: Path, tmp_path: Path) -> None:
    """Rank 0 is in a call that never returns, as a driver's may be."""
    command = [sys.executable, "-c", STUCK, str(tiny_model), str(tmp_path / "failed")]
    env = child_environment()
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=2 * LIMIT)
    assert ended.returncode == hang_guard.RANK_FAILED, ended.stderr
    assert re.search(r"rank 1 \(pid \d+\) died with signal 9$", ended.stderr, re.M)


def test_only_a_thread_that_stays_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang_guard, "STUCK_LIMIT", 0.3)
    ended: list[str] = []
    ended_now = threading.Event()
    guard = HangGuard(lambda why: (ended.append(why), ended_now.set()))  # type: ignore[func-returns-value]
    guard.failed("idle")
    with guard:
        guard.failed("noticed")
    with guard:
        time.sleep(0.6)
        assert not ended
        guard.failed("stuck")
        assert ended_now.wait(LIMIT)
    assert ended == ["stuck"]


AT_THE_END = """
import atexit, time
from millrace.replica import hang_guard as guard
atexit.register(time.sleep, 60)  # what comes first ends last
guard.EXIT_LIMIT = 0.5
guard.HangGuard().failed("gone")
"""


def test_a_program_whose_ranks_failed_does_not_hang_as_it_ends() -> None:
    done = subprocess.run([sys.executable, "-c", AT_THE_END], timeout=LIMIT)
    assert done.returncode == -signal.SIGALRM


def test_interruptible_calls() -> None:
    def fail() -> None:
        raise RankError("gone")

    def spoil() -> int:
        raise KeyError("x")

    assert run_interruptibly(lambda: 7, fail) == 7
    with pytest.raises(KeyError):
        run_interruptibly(spoil, lambda: None)
    never = threading.Event()
    with pytest.raises(RankError, match="gone"):
        run_interruptibly(never.wait, fail)
    never.set()


def test_a_call_that_holds_the_interpreter_lock_is_ended_too() -> None:
    ended_at_once = (
        "import ctypes; from millrace.runtime.ranks.interruptible import kill_process_after\n"
    )
    ended_at_once += "with kill_process_after(0.5): ctypes.PyDLL(None).sleep(60)"
    done = subprocess.run(
        [sys.executable, "-c", ended_at_once], capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 1
    assert "Timeout (0:00:00.5" in done.stderr
    with kill_process_after(60.0):
        ctypes.PyDLL(None).sleep(0)


class Work:
    """A collective that ends just as a wait for it gives up, well or not."""

    def __init__(self, error: str = "") -> None:
        self._error, self._waits = error, 0

    def is_completed(self) -> bool:
        return self._waits > 0

    def wait(self, limit: Any = None) -> None:
        self._waits += 1
        if self._waits == 1:
            raise RuntimeError("Operation timed out!")
        if self._error:
            raise RuntimeError(self._error)


def test_a_collective_that_ends_as_a_wait_does_has_not_failed() -> None:
    Ranks().wait_for_work(Work())
    with pytest.raises(RuntimeError, match="Connection closed"):
        Ranks().wait_for_work(Work("Connection closed"))


def test_every_wait_for_the_device_has_a_limit() -> None:
    """Waits go through `Ranks.wait`, which checks the heartbeat; CUDA's synchronize does not."""
    for file in sorted((ROOT / "src/millrace/runtime").rglob("*.py")):
        found = re.findall(r"\w*\.synchronize\(", file.read_text())
        allowed = ["event.synchronize("] if file.name == "ranks.py" else []  # one rank alone
        assert found == allowed, file
