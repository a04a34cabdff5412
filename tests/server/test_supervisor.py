"""The parent of a server process: it restarts what crashed, and passes on signals and statuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest

from millrace.common.backoff import BackoffPolicy
from millrace.common.sockets import listen
from millrace.config import EngineArgs
from millrace.server.options import ServerOptions
from millrace.server.supervisor import supervise
from tests.support.fake_engine import VARIABLE as ENGINE_VARIABLE
from tests.support.fake_engine import Behaviour
from tests.support.live_server import SANDBOX, SERVE_FAKE, command_line, started, wait_for

FAST = BackoffPolicy(first=0.01, longest=0.05)
# Runs a command under the supervisor: argv[1] restarts, the rest the command.
SUPERVISE = """
import sys
from millrace.common.backoff import BackoffPolicy
from millrace.common.sockets import listen
from millrace.server.supervisor import supervise
listeners = listen("127.0.0.1", 0)
sys.exit(supervise(sys.argv[2:], listeners, int(sys.argv[1]), BackoffPolicy(first=0.1)))
"""


def script(body: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(body)]


def crashing(count: Path, times: int, then: str) -> list[str]:
    """A program that kills itself so many times and then does something else."""
    return script(f"""
        import os, pathlib, signal, sys
        count = pathlib.Path({str(count)!r})
        runs = len(count.read_text()) if count.exists() else 0
        count.write_text("x" * (runs + 1))
        if runs < {times}:
            os.kill(os.getpid(), signal.SIGSEGV)
        {then}
    """)


def test_a_crash_is_followed_by_a_restart_and_the_status_is_passed_on(tmp_path: Path) -> None:
    listeners = listen("127.0.0.1", 0)
    command = crashing(tmp_path / "runs", 2, "sys.exit(7)")
    assert supervise(command, listeners, 3, FAST) == 7
    assert (tmp_path / "runs").read_text() == "xxx"


def test_a_status_is_final(tmp_path: Path) -> None:
    command = crashing(tmp_path / "runs", 0, "sys.exit(2)")
    assert supervise(command, listen("127.0.0.1", 0), 3, FAST) == 2
    assert (tmp_path / "runs").read_text() == "x"


def test_restarts_have_an_end(tmp_path: Path) -> None:
    command = crashing(tmp_path / "runs", 100, "")
    assert supervise(command, listen("127.0.0.1", 0), 2, FAST) == 1
    assert (tmp_path / "runs").read_text() == "xxx"


def test_the_supervisors_own_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert supervise(script("pass"), listen("127.0.0.1", 0), 3, FAST) == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_server(tmp_path: Path, number: signal.Signals) -> None:
    ready = tmp_path / "ready"
    command = script(f"""
        import pathlib, signal, sys
        signal.signal({number.value}, lambda *_: sys.exit(5))
        pathlib.Path({str(ready)!r}).write_text("")
        signal.pause()
    """)
    parent = subprocess.Popen([sys.executable, "-c", SUPERVISE, "3", *command])
    wait_for(ready.exists)
    parent.send_signal(number)
    assert parent.wait(20) == 5


def test_a_server_does_not_outlive_its_supervisor(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    command = script(f"""
        import os, pathlib, time
        from millrace.server.supervisor import inherited_listeners
        listeners = inherited_listeners()
        assert [one.getsockname()[0] for one in listeners] == ["127.0.0.1"]
        assert not any(one.get_inheritable() for one in listeners)
        pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))
        time.sleep(600)
    """)
    parent = subprocess.Popen([sys.executable, "-c", SUPERVISE, "3", *command])
    wait_for(lambda: pid.exists() and pid.read_text())
    parent.kill()
    parent.wait()
    wait_for(lambda: not psutil.pid_exists(int(pid.read_text())))


def sandboxes(server: psutil.Process) -> list[psutil.Process]:
    return [one for one in server.children() if SANDBOX in command_line(one)]


def test_a_server_that_is_killed_comes_back_on_its_port(text_model: Path, tmp_path: Path) -> None:
    args = EngineArgs(model=str(text_model), served_model_name=["fake"])
    options = ServerOptions(port=0)
    server_command = [
        sys.executable,
        str(SERVE_FAKE),
        *(msgspec.json.encode(one).decode() for one in (args, options)),
    ]
    command = [sys.executable, "-c", SUPERVISE, "3", *server_command]
    environment = {ENGINE_VARIABLE: msgspec.json.encode(Behaviour()).decode()}
    with started(command, tmp_path / "log", environment) as supervisor:
        supervisor.wait_ready()
        url = supervisor.url
        for _ in range(2):
            (server,) = psutil.Process(supervisor.process.pid).children()
            wait_for(lambda: sandboxes(server))  # noqa: B023
            below = server.children(recursive=True)
            os.kill(server.pid, signal.SIGSEGV)
            assert httpx.get(f"{url}/version", timeout=30).status_code == 200
            wait_for(lambda: httpx.get(f"{url}/health", timeout=30).status_code == 200, 30)
            assert psutil.wait_procs(below, timeout=10)[1] == []
        assert "ended with signal 11; starting it again" in supervisor.log
        supervisor.process.send_signal(signal.SIGHUP)
        assert supervisor.process.wait(20) == 0
