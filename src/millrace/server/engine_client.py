"""The front's end of an engine: requests go in, streams of deltas come out.

Two ZMQ sockets in a private directory carry the unions of `millrace.protocol`. The client notices
at once when the engine process ends, and then fails every open stream with one clear error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

import msgspec
import zmq

from millrace.config import EngineArgs
from millrace.errors import UserError
from millrace.protocol import (
    Abort,
    AddRequest,
    EngineStats,
    Failed,
    FromEngine,
    Outputs,
    Ready,
    Shutdown,
    ToEngine,
)
from millrace.server.engine_process import ENGINE_PROGRAM, EngineProcess
from millrace.server.metrics import RequestMetrics
from millrace.server.stream import Stream

logger = logging.getLogger(__name__)

RESEND_SECONDS = 0.005
MAX_IPC_PATH = 90  # a Unix socket's name has at most 107 bytes

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(FromEngine).decode


class EngineDeadError(Exception):
    """The engine process has ended, or cannot go on; the message says how."""


class EngineClient:
    """One engine and the requests that are open in it.

    ready: what the engine said when it was, None before. stats: its latest figures.
    """

    def __init__(self, metrics: RequestMetrics) -> None:
        self.ready: Ready | None = None
        self.stats = EngineStats()
        self.died: Exception | None = None
        self._metrics = metrics
        self._streams: dict[str, Stream] = {}
        self._outbox: deque[bytes] = deque()
        self._changed = asyncio.Event()  # set once the engine is ready or dead, again once dead
        self._stopping = False

    async def start(self, args: EngineArgs, program: Sequence[str] = ENGINE_PROGRAM) -> None:
        """Make the sockets and start the engine process; it loads while this returns."""
        self._loop = asyncio.get_running_loop()
        self._directory = _socket_directory()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._to_engine = context.socket(zmq.PUSH)
        self._to_engine.setsockopt(zmq.SNDHWM, 0)  # the number of requests is bounded elsewhere
        self._to_engine.bind(f"ipc://{self._directory}/to-engine")
        self._from_engine = context.socket(zmq.PULL)
        self._from_engine.setsockopt(zmq.RCVHWM, 0)
        self._descriptor = int(self._from_engine.getsockopt(zmq.FD))
        self._from_engine.bind(f"ipc://{self._directory}/from-engine")
        self._loop.add_reader(self._descriptor, self._receive)
        self._process = await EngineProcess.start(args, self._directory, program)
        self._watch = self._loop.create_task(self._watch_process())

    async def wait_ready(self) -> Ready:
        """Wait for the engine's first real step. Raises UserError or EngineDeadError."""
        await self._changed.wait()
        if self.died is not None:
            raise self.died
        assert self.ready is not None
        return self.ready

    async def wait_died(self) -> Exception:
        """Wait for the engine's unexpected end, and say how it came."""
        while self.died is None:
            self._changed.clear()
            await self._changed.wait()
        return self.died

    @property
    def healthy(self) -> bool:
        return self.ready is not None and self.died is None and not self._stopping

    @property
    def open_requests(self) -> int:
        return len(self._streams)

    def open(self, request: AddRequest) -> Stream:
        """Hand a request to the engine. Whoever opens a stream closes it."""
        stream = Stream(request, self._metrics)
        if self.died is not None:
            stream.fail(self.died)
            return stream
        self._streams[request.id] = stream
        self._send(request)
        return stream

    def close(self, stream: Stream) -> None:
        """Let go of a stream; what has not ended is aborted in the engine."""
        if self._streams.pop(stream.id, None) is not None and not stream.ended:
            stream.abandon()
            self._send(Abort([stream.id]))

    def fail_all(self, error: Exception) -> None:
        """Give every open request this error."""
        for stream in self._streams.values():
            stream.fail(error)

    async def stop(self) -> None:
        """End the engine, by force if it must be, and remove what `start` made."""
        self._stopping = True
        self._send(Shutdown())
        await self._process.end()
        self._watch.cancel()
        self._loop.remove_reader(self._descriptor)
        self._to_engine.close(linger=0)
        self._from_engine.close(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _send(self, message: ToEngine) -> None:
        self._outbox.append(_encode(message))
        self._flush()

    def _flush(self) -> None:
        """Send what waits. It waits only while the engine is not connected, which passes."""
        while self._outbox and self.died is None:
            try:
                self._to_engine.send(self._outbox[0], zmq.NOBLOCK)
            except zmq.Again:
                self._loop.call_later(RESEND_SECONDS, self._flush)
                return
            self._outbox.popleft()

    def _receive(self) -> None:
        # The descriptor signals changes, not a state: read until there is nothing left.
        with contextlib.suppress(zmq.Again):
            while True:
                self._handle(_decode(self._from_engine.recv(zmq.NOBLOCK)))

    def _handle(self, message: FromEngine) -> None:
        if isinstance(message, Outputs):
            self.stats = message.stats
            now = monotonic()
            for delta in message.deltas:
                stream = self._streams.get(delta.id)
                if stream is not None:  # None: closed here while the delta was under way
                    stream.put(delta, now)
        elif isinstance(message, Ready):
            self.ready = message
            self._changed.set()
        else:
            self._die(_failure(message))

    async def _watch_process(self) -> None:
        status = await self._process.wait()
        self._receive()  # its last words, if there are any
        if not self._stopping:
            how = f"signal {-status}" if status < 0 else f"status {status}"
            self._die(EngineDeadError(f"the engine process ended with {how}"))

    def _die(self, error: Exception) -> None:
        if self.died is None:
            self.died = error
            if not isinstance(error, UserError):  # that one the command reports, in one line
                logger.error("%s; %d requests were open", error, len(self._streams))
            self.fail_all(EngineDeadError(str(error)))
            self._changed.set()


def _failure(message: Failed) -> Exception:
    return UserError(message.message) if message.user_error else EngineDeadError(message.message)


def _socket_directory() -> Path:
    """A directory that only this user can enter, with a name short enough for a socket."""
    directory = Path(tempfile.mkdtemp(prefix="millrace-"))
    if len(str(directory)) > MAX_IPC_PATH:
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="millrace-", dir="/tmp"))
    return directory
