"""`millrace serve` with nowhere to write: it serves, restarts its engine, and ends in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from millrace.common.sockets import free_port
from tests.support.child_environment import child_environment
from tests.support.live_server import wait_for

BODY = {"prompt": [5, 6, 7], "max_tokens": 2}
FLAGS = (
    *("--dtype=float32", "--max-model-len=128", "--max-num-seqs=4"),
    *("--kv-cache-memory-bytes=16777216", "--plan-log=/dev/full", "--shutdown-timeout=5"),
)


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    "redirections",
    [
        pytest.param(">/dev/full 2>&1", id="full"),
        pytest.param(">&- 2>&-", id="closed", marks=pytest.mark.sweep),  # all-closed is more
        pytest.param("<&- >&- 2>&-", id="all-closed"),
        pytest.param("2>&1 | head -n 1 >/dev/null", id="no-reader"),
    ],
)
def test_a_server_runs_without_streams_to_write_to(small_model: Path, redirections: str) -> None:
    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "millrace.cli", "serve", str(small_model), f"--port={port}"]
    shell = subprocess.Popen(
        ["bash", "-c", f'"$@" {redirections}', "-", *command, *FLAGS],
        env=child_environment(OMP_NUM_THREADS="1"), start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: healthy(url), 120)
        for _ in range(20):
            assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=30).status_code == 200
        server = server_of(port)
        (engine,) = engines_of(server)
        engine.kill()
        wait_for(lambda: not healthy(url))
        wait_for(lambda: healthy(url), 60)
        assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=30).status_code == 200
        children = server.children(recursive=True)
        assert len(engines_of(server)) == 1
        server.terminate()
        assert server.wait(20) in (0, None)  # None: it is the shell's child, not ours
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait(10)


def engines_of(server: psutil.Process) -> list[psutil.Process]:
    return [one for one in server.children() if "millrace.replica.process" in one.cmdline()]


def server_of(port: int) -> psutil.Process:
    """The process that listens on a port."""
    (listener,) = {
        one.pid
        for one in psutil.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.port == port
    }
    return psutil.Process(listener)
