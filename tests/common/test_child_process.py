"""Children end with their parent, and are reaped within a bound."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from millrace.common import child_process
from millrace.common.child_process import (
    child_environment,
    end_process,
    kill_group,
    kill_process,
    python_module,
    reap,
)
from tests.support.child_environment import child_environment as with_sources
from tests.support.running import run

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); "
    "time.sleep(600)",
]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
def test_a_child_dies_with_a_parent_that_is_killed() -> None:
    child = (
        "import os, sys, time; from millrace.common.child_process import end_with_parent; "
        "end_with_parent(int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(600)"
    )
    parent = (
        "import os, subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {child!r}, str(os.getpid())])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, env=with_sources()
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert not gone(pid)
    process.kill()
    process.wait(10)
    assert wait_gone(pid)


def test_a_child_whose_parent_is_gone_already_ends() -> None:
    program = "from millrace.common.child_process import end_with_parent; end_with_parent(1 << 30)"
    done = subprocess.run([sys.executable, "-c", program], env=with_sources(), timeout=60)
    assert done.returncode == 1


def test_the_environment_and_the_interpreter_are_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/some/where")
    changed = child_environment(OMP_NUM_THREADS="3")
    assert changed == {**os.environ, "OMP_NUM_THREADS": "3"}
    assert changed["PYTHONPATH"] == "/some/where"
    assert python_module("a.b", "c") == [sys.executable, "-m", "a.b", "c"]


def test_reap_waits_for_the_quick_and_kills_the_slow() -> None:
    quick = subprocess.Popen([sys.executable, "-c", "pass"])
    slow = subprocess.Popen(SLEEP)
    os.waitid(os.P_PID, quick.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is not reaped
    assert reap([quick, slow], 0.2) == 1
    assert (quick.returncode, slow.returncode) == (0, -signal.SIGKILL)
    assert reap([quick, slow], 0.0) == 0


def test_reap_kills_the_group_where_asked() -> None:
    program = (
        "import subprocess, sys, time; "
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, "
        "flush=True); time.sleep(600)"
    )
    leader = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True
    )
    assert leader.stdout is not None
    grandchild = int(leader.stdout.readline())
    assert reap([leader], 0.0, groups=True) == 1
    assert wait_gone(grandchild)
    kill_group(leader.pid)  # nothing is left; no error


def test_a_process_that_outlives_its_kill_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(child_process, "REAP_SECONDS", 0.1)
    process = subprocess.Popen(SLEEP)
    monkeypatch.setattr(process, "kill", lambda: None)
    began = time.monotonic()
    assert reap([process], 0.0) == 1
    assert process.returncode is None
    assert time.monotonic() - began < 5
    monkeypatch.undo()
    reap([process], 0.0)


def test_the_signals_follow_each_other() -> None:
    async def scenario() -> None:
        gentle = await asyncio.create_subprocess_exec(*SLEEP)
        assert await end_process(gentle, (0.0, signal.SIGTERM), (20.0, signal.SIGKILL)) == -15
        stubborn = await asyncio.create_subprocess_exec(*STUBBORN, stdout=asyncio.subprocess.PIPE)
        assert stubborn.stdout is not None
        await stubborn.stdout.readline()  # it ignores SIGTERM now
        assert await end_process(stubborn, (0.0, signal.SIGTERM), (0.3, signal.SIGKILL)) == -9
        ended = await asyncio.create_subprocess_exec(sys.executable, "-c", "raise SystemExit(3)")
        assert await end_process(ended, (20.0, signal.SIGKILL)) == 3
        assert await kill_process(ended) == 3
        killed = await asyncio.create_subprocess_exec(*SLEEP)
        assert await kill_process(killed) == -9

    run(scenario())
