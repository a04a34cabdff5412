"""Several relays on one port, each a process; this one keeps them alive.

Every process listens for itself (SO_REUSEPORT), so one that dies takes only its own connections
along, and the kernel gives new ones to the others. They share the board's memory; over a socket
each is told the list of replicas, and asks for the answers that only the keeper's process has.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable

import msgspec

from millrace.common.backoff import Backoff, BackoffPolicy
from millrace.common.child_process import end_process, python_module
from millrace.common.framing import Framing
from millrace.common.sockets import bind, require_free_port
from millrace.errors import UserError
from millrace.gateway.common.shared_counters import SharedCounters
from millrace.gateway.health.health_monitor import HealthMonitor
from millrace.gateway.http.message import Answer, Request
from millrace.gateway.processes.worker import GatewayOptions
from millrace.gateway.routing.replicas import Member

_START_SECONDS = 30.0
_STOP_SECONDS = 5.0  # beyond the drain, for a process to end by itself
_RESTARTS = BackoffPolicy(first=0.1, longest=10.0, settled=30.0)
_LONGEST_MESSAGE = 1 << 30  # bytes: a request for the gateway itself with its body


class Members(msgspec.Struct, frozen=True, tag="members"):
    """Downwards: the replicas as they are."""

    members: list[Member]


class OwnReply(msgspec.Struct, frozen=True, tag="reply"):
    """Downwards: the answer to an OwnRequest."""

    number: int
    answer: Answer


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Downwards: end, once requests under way have; after `drain` seconds in any case."""

    drain: float


class Listening(msgspec.Struct, frozen=True, tag="listening"):
    """Upwards: clients can connect."""


class Report(msgspec.Struct, frozen=True, tag="report"):
    """Upwards: what `Keeper.report` is told."""

    id: int
    reason: str | None


class OwnRequest(msgspec.Struct, frozen=True, tag="request"):
    """Upwards: a request for the gateway itself."""

    number: int
    request: Request


Down = Members | OwnReply | Stop
Up = Listening | Report | OwnRequest


class Channel:
    """Messages over a stream, in both directions. Those that come are of type `kind`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: object
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._framing: Framing[object] = Framing(kind, _LONGEST_MESSAGE)

    def send(self, message: Down | Up) -> None:
        """Send a message; nothing happens when the other side has gone. Raises FramingError for one
        that is too long."""
        data = self._framing.encode(message)
        if not self._writer.is_closing():
            self._writer.write(data)

    async def receive(self) -> object | None:
        """The next message; None when the other side has gone."""
        try:
            return await self._framing.receive(self._reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def close(self) -> None:
        """Drop the connection."""
        self._writer.close()


class _Process:
    """One worker process, and what to reach it by."""

    def __init__(self, process: asyncio.subprocess.Process, channel: Channel) -> None:
        self.process = process
        self.channel = channel
        self.listening = asyncio.Event()


class WorkerProcesses:
    """All worker processes. answer: for requests for the gateway itself, but for /health."""

    def __init__(
        self,
        options: GatewayOptions,
        counters: SharedCounters,
        monitor: HealthMonitor,
        answer: Callable[[Request], Awaitable[Answer]],
        log: Callable[[str], None],
    ) -> None:
        self._options = options
        self._counters = counters
        self._monitor = monitor
        self._answer = answer
        self._log = log
        self._held: list[socket.socket] = []
        self._running: dict[int, _Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = False
        self.restarts = 0
        self.port = 0

    @property
    def pids(self) -> list[int]:
        """Process ids, in the order of their parts of the board."""
        return [one.process.pid for _, one in sorted(self._running.items())]

    def tell(self, members: list[Member]) -> None:
        """Tell every process what the keeper says."""
        for one in self._running.values():
            one.channel.send(Members(members))

    async def start(self) -> None:
        """Take the port and start every process. Raises UserError when it is taken."""
        host, port = self._options.host, self._options.port
        require_free_port(host, port)  # somebody else who shares it would not be noticed below
        # Held for as long as we live, so that the port stays ours while processes come and go.
        self._held = bind(host, port, shared=True)
        self.port = self._held[0].getsockname()[1]
        self._options = msgspec.structs.replace(self._options, port=self.port)
        await asyncio.gather(*(self._spawn(i) for i in range(self._options.processes)))
        if not all(one.listening.is_set() for one in self._running.values()):
            await self.stop(0.0)
            raise UserError("a gateway process did not start; what it said stands above")
        self._keepers = [asyncio.create_task(self._keep(i)) for i in range(self._options.processes)]

    async def stop(self, drain: float) -> None:
        """End every process, by force a moment after `drain` seconds."""
        self._stopping = True
        for monitor in self._keepers:
            monitor.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for one in self._running.values():
            one.channel.send(Stop(drain))
        running = self._running.values()
        step = (drain + _STOP_SECONDS, signal.SIGKILL)
        await asyncio.gather(*(end_process(one.process, step) for one in running))
        for one in running:
            one.channel.close()
        for held in self._held:
            held.close()

    async def _spawn(self, index: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = (index, theirs.fileno(), self._counters.fd, os.getpid())
            process = await asyncio.create_subprocess_exec(
                *python_module("millrace.gateway.processes.worker_process", *map(str, arguments)),
                stdin=asyncio.subprocess.PIPE,
                pass_fds=(theirs.fileno(), self._counters.fd),
                start_new_session=True,  # a Ctrl-C is for us; we tell them
            )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(self._options))
        process.stdin.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        one = _Process(process, Channel(reader, writer, Up))
        self._running[index] = one
        one.channel.send(Members(self._monitor.members))
        listen = asyncio.create_task(self._listen(one))
        waits = [asyncio.ensure_future(one.listening.wait()), listen]
        await asyncio.wait(waits, timeout=_START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        waits[0].cancel()

    async def _listen(self, one: _Process) -> None:
        """Take what a process says until it ends."""
        while (message := await one.channel.receive()) is not None:
            if isinstance(message, Listening):
                one.listening.set()
            elif isinstance(message, Report):
                self._monitor.report(message.id, message.reason)
            elif isinstance(message, OwnRequest):
                asyncio.create_task(self._reply(one, message))  # noqa: RUF006

    async def _reply(self, one: _Process, message: OwnRequest) -> None:
        answer = await self._answer(message.request)
        one.channel.send(OwnReply(message.number, answer))

    async def _keep(self, index: int) -> None:
        """Restart a process whenever it ends."""
        backoff = Backoff(_RESTARTS)
        while True:
            began = time.monotonic()
            one = self._running[index]
            status = await one.process.wait()
            one.channel.close()
            self._counters.clear_gauges(index)
            pause = backoff.failed(time.monotonic() - began)
            self._log(
                f"gateway process {one.process.pid} ended with status {status}; "
                f"another one starts in {pause:g} s"
            )
            await asyncio.sleep(pause)
            self.restarts += 1
            await self._spawn(index)
