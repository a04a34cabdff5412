"""Starts a server as a process of its own, for tests that talk to it over HTTP."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import msgspec
import psutil

from millrace.config import EngineArgs
from millrace.server.options import ServerOptions
from tests.support.fake_engine import VARIABLE, Behaviour

SANDBOX = "millrace.server.sandbox.child"
SERVE_FAKE = Path(__file__).with_name("serve_fake.py")


class LiveServer:
    """A running server process and what a test may ask of it."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def url(self) -> str:
        """Where it listens; known once the engine is ready."""
        found = re.search(r"at (https?://\S+)\. Try", self.log)
        assert found, f"the server is not ready:\n{self.log}"
        return found.group(1)

    def wait_ready(self, timeout: float = 60.0) -> None:
        wait_for(lambda: "Try:" in self.log or self.process.poll() is not None, timeout)
        assert self.process.poll() is None, self.log

    def engine(self) -> psutil.Process:
        (engine,) = [one for one in self._processes() if "--socket-dir" in command_line(one)]
        return engine

    def sandboxes(self) -> list[psutil.Process]:
        """The processes that work on clients' data."""
        return [one for one in self._processes() if SANDBOX in command_line(one)]

    def _processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def metric(self, name: str) -> float:
        """The sum over all labels of one metric."""
        return _sum_of(name, self._metrics())

    def open_in_engine(self) -> float:
        """Requests that the engine holds, as it says itself."""
        page = self._metrics()
        names = ("millrace:num_requests_running", "millrace:num_requests_waiting")
        return sum(_sum_of(name, page) for name in names)

    def _metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics").text


def _sum_of(name: str, page: str) -> float:
    """The sum over all labels of a metric on a page."""
    rows = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", page, flags=re.MULTILINE)
    assert rows, f"no {name} in the metrics"
    return sum(map(float, rows))


def command_line(process: psutil.Process) -> list[str]:
    """A process's arguments; none once it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def wait_for(condition: Callable[[], object], timeout: float = 10.0) -> None:
    """Wait until the condition holds; fail after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come to hold"
        time.sleep(0.02)


@contextlib.contextmanager
def fake_server(
    model: Path,
    log: Path,
    behaviour: Behaviour | None = None,
    *,
    ready: bool = True,
    environment: dict[str, str] | None = None,
    constants: dict[str, float] | None = None,
    **given: object,
) -> Iterator[LiveServer]:
    """A server over a fake engine. Its name for the model is `fake`.

    constants: of modules of the server, as `serve_fake` takes them. given: fields of EngineArgs and
    of ServerOptions.
    """
    context = {name: given.pop(name) for name in ServerOptions.__struct_fields__ if name in given}
    options = msgspec.convert({"port": 0, "max_body_bytes": 1 << 20, **context}, ServerOptions)
    args = msgspec.convert(
        {"model": str(model), "served_model_name": ["fake", "alias"], **given}, EngineArgs
    )
    command = [
        sys.executable,
        str(SERVE_FAKE),
        *(msgspec.json.encode(o).decode() for o in (args, options, constants or {})),
    ]
    encoded = msgspec.json.encode(behaviour or Behaviour()).decode()
    with started(command, log, {VARIABLE: encoded, **(environment or {})}) as server:
        if ready:
            server.wait_ready()
        yield server


@contextlib.contextmanager
def started(
    command: Sequence[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[LiveServer]:
    """Run a server command; afterwards it is gone, and so is its engine."""
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )  # fmt: skip
    server = LiveServer(process, log)
    try:
        yield server
    finally:
        children = _children(process.pid)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _, alive = psutil.wait_procs(children, timeout=5)
        for child in alive:
            child.kill()
        assert not alive, f"left behind: {alive}"


def _children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []
