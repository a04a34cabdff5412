"""Several gateway processes on one port, and the main process that restarts them.

Every process accepts at a socket of its own (SO_REUSEPORT), which the main process holds as well. A
process that dies loses the connections that it had accepted; until another one has taken its place,
the others accept at its socket too, so those that wait there are served. They share the counters'
memory. Over a socket the main process sends each the list of replicas and answers its local
requests.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec

from millrace.common.backoff import Backoff, BackoffPolicy
from millrace.common.child_process import end_process, python_module
from millrace.common.framing import Framing
from millrace.common.tasks import reported, restarted
from millrace.errors import UserError
from millrace.gateway.common.shared_counters import SharedCounters
from millrace.gateway.health.health_monitor import HealthMonitor
from millrace.gateway.http.message import LocalReply, Request, error_reply
from millrace.gateway.processes.listeners import (
    Inherited,
    Listener,
    close_listeners,
    inheritable,
    open_listeners,
    port_of,
    remove_unix_socket,
)
from millrace.gateway.processes.options import GatewayOptions
from millrace.gateway.routing.replicas import Member
from millrace.gateway.routing.suspects import Outcome, Suspect

_START_SECONDS = 30.0
_STOP_SECONDS = 5.0  # beyond the drain, for a process to end by itself
_RESTARTS = BackoffPolicy(first=0.1, longest=10.0, settled=30.0)
_LONGEST_MESSAGE = 1 << 30  # bytes: a request for the gateway itself with its body


class Start(msgspec.Struct, frozen=True):
    """What a process gets on stdin. listeners: of every process."""

    options: GatewayOptions
    listeners: list[list[Inherited]]


class Members(msgspec.Struct, frozen=True, tag="members"):
    """To a process: the current replicas."""

    members: list[Member]


class AdminReply(msgspec.Struct, frozen=True, tag="reply"):
    """To a process: the reply to an AdminRequest."""

    number: int
    answer: LocalReply


class Cover(msgspec.Struct, frozen=True, tag="cover"):
    """To a process: accept connections for these processes too, which are not listening now, and
    for no others."""

    dead: list[int]


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """To a process: end when the running requests have ended, after `drain` seconds at most."""

    drain: float


class Listening(msgspec.Struct, frozen=True, tag="listening"):
    """To the main process: clients can connect."""


class Report(msgspec.Struct, frozen=True, tag="report"):
    """To the main process: arguments of `HealthMonitor.report`."""

    id: int
    outcome: Outcome


class AdminRequest(msgspec.Struct, frozen=True, tag="request"):
    """To the main process: a local request."""

    number: int
    request: Request


Down = Members | AdminReply | Suspect | Cover | Stop
Up = Listening | Report | AdminRequest


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
        """The next message; None once the other side has gone."""
        try:
            return await self._framing.receive(self._reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def close(self) -> None:
        """Drop the connection."""
        self._writer.close()


class _Child:
    """One gateway process and its channel."""

    def __init__(self, process: asyncio.subprocess.Process, channel: Channel) -> None:
        self.process = process
        self.channel = channel
        self.listening = asyncio.Event()


class GatewayProcesses:
    """All gateway processes. answer: handles local requests other than /health."""

    def __init__(
        self,
        options: GatewayOptions,
        counters: SharedCounters,
        monitor: HealthMonitor,
        answer: Callable[[Request], Awaitable[LocalReply]],
        log: Callable[[str], None],
    ) -> None:
        self._options = options
        self._counters = counters
        self._monitor = monitor
        self._answer = answer
        self._log = log
        self._listeners: list[list[Listener]] = []
        self._running: dict[int, _Child] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self.restarts = 0
        self.port = 0

    @property
    def pids(self) -> list[int]:
        """Process ids, in the order of their parts of the counters."""
        return [child.process.pid for _, child in sorted(self._running.items())]

    def send_members(self, members: list[Member]) -> None:
        """Send the replicas to every process."""
        for child in self._running.values():
            child.channel.send(Members(members))

    def send_suspect(self, suspect: Suspect) -> None:
        """Send the evidence against a request to every process."""
        for child in self._running.values():
            child.channel.send(suspect)

    async def start(self) -> None:
        """Take the ports and start every process. Raises UserError when one is taken."""
        self._listeners = open_listeners(self._options, self._options.processes)
        self.port = port_of(self._listeners[0], "public")
        await asyncio.gather(*(self._spawn(i) for i in range(self._options.processes)))
        if not all(child.listening.is_set() for child in self._running.values()):
            await self.stop(0.0)
            raise UserError("a gateway process did not start; its own message is above")
        self._tasks = [
            restarted(
                f"the restarts of gateway process {i}", partial(self._restart_loop, i), self._log
            )
            for i in range(self._options.processes)
        ]

    async def stop(self, drain: float) -> None:
        """End every process, by force a moment after `drain` seconds."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        close_listeners(*self._listeners)  # each process closes them too: nobody listens any more
        for child in self._running.values():
            child.channel.send(Stop(drain))
        running = self._running.values()
        step = (drain + _STOP_SECONDS, signal.SIGKILL)
        await asyncio.gather(*(end_process(child.process, step) for child in running))
        for child in running:
            child.channel.close()
        if self._listeners:
            remove_unix_socket(self._options.admin_uds)

    async def _spawn(self, index: int) -> None:
        ours, theirs = socket.socketpair()
        listeners = inheritable(self._listeners)
        with theirs:
            arguments = (index, theirs.fileno(), self._counters.fd, os.getpid())
            inherited = [one.fd for row in listeners for one in row]
            process = await asyncio.create_subprocess_exec(
                *python_module("millrace.gateway.processes.gateway_process", *map(str, arguments)),
                stdin=asyncio.subprocess.PIPE,
                pass_fds=(theirs.fileno(), self._counters.fd, *inherited),
                start_new_session=True,  # a Ctrl-C is for us; we tell them
            )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(Start(self._options, listeners)))
        process.stdin.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        child = _Child(process, Channel(reader, writer, Up))
        self._running[index] = child
        child.channel.send(Members(self._monitor.members))
        name = f"the channel of gateway process {process.pid}"
        listen = reported(name, self._receive_loop(child), self._log, lambda error: process.kill())
        waits = [asyncio.ensure_future(child.listening.wait()), listen]
        await asyncio.wait(waits, timeout=_START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        waits[0].cancel()

    async def _receive_loop(self, child: _Child) -> None:
        """Handle the messages of a process until it ends."""
        while (message := await child.channel.receive()) is not None:
            if isinstance(message, Listening):
                child.listening.set()
                self._send_cover()
            elif isinstance(message, Report):
                self._monitor.report(message.id, message.outcome)
            elif isinstance(message, AdminRequest):
                reported("a local request", self._reply(child, message), self._log)

    def _send_cover(self) -> None:
        """Tell every process that listens for which others it accepts connections."""
        running = self._running
        dead = [i for i in range(self._options.processes)
                if i not in running or not running[i].listening.is_set()]  # fmt: skip
        for child in running.values():
            if child.listening.is_set():
                child.channel.send(Cover(dead))

    async def _reply(self, child: _Child, message: AdminRequest) -> None:
        try:
            answer = await self._answer(message.request)
        except Exception:
            answer = error_reply(500, "the gateway failed on this request; its log says more")
            child.channel.send(AdminReply(message.number, answer))
            raise
        child.channel.send(AdminReply(message.number, answer))

    async def _restart_loop(self, index: int) -> None:
        """Restart a process whenever it ends."""
        backoff = Backoff(_RESTARTS)
        while True:
            began = time.monotonic()
            child = self._running[index]
            status = await child.process.wait()
            child.channel.close()
            child.listening.clear()
            self._send_cover()
            self._counters.clear_gauges(index)
            pause = backoff.failed(time.monotonic() - began)
            self._log(
                f"gateway process {child.process.pid} ended with status {status}; "
                f"another one starts in {pause:g} s"
            )
            await asyncio.sleep(pause)
            self.restarts += 1
            await self._spawn(index)
