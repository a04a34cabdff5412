"""One engine's life: its process, and the two sockets to it in a private directory.

A link knows how messages travel and how an engine ended, not what the messages mean. Once its
engine has ended a link is of no use; the next engine gets a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zmq

from millrace.common.scratch import ScratchDirectory
from millrace.config import EngineArgs
from millrace.protocol import Failed, FromEngine, ToEngine
from millrace.replica.watchdog import REPORT, where
from millrace.server.engine_link.process import EngineProcess

logger = logging.getLogger(__name__)

RESEND_SECONDS = 0.005
FAILURE_MESSAGE_SECONDS = 1.0  # for the message of an engine that has ended
MAX_IPC_PATH = 90  # a Unix socket's name has at most 107 bytes

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(FromEngine).decode


class EngineLink:
    """The connection to one engine process.

    on_message is called with each message; on_finish with one line that says how the process ended,
    once, unless `stop` ended it.
    """

    def __init__(
        self,
        on_message: Callable[[FromEngine], None],
        on_finish: Callable[[str], None],
    ) -> None:
        self._on_message = on_message
        self._on_finish = on_finish
        self._outbox: deque[bytes] = deque()
        self._closed = False
        self._failed = False  # the engine has reported why it ends
        self._process: EngineProcess | None = None

    async def start(self, args: EngineArgs, program: Sequence[str]) -> None:
        """Make the sockets and start the engine process; it loads while this returns.

        Raises OSError when there can be no process.
        """
        self._loop = asyncio.get_running_loop()
        self._scratch = _socket_directory()
        self._directory = self._scratch.path
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._to_engine = context.socket(zmq.PUSH)
        self._to_engine.setsockopt(zmq.SNDHWM, 0)  # the number of requests is bounded elsewhere
        self._to_engine.bind(f"ipc://{self._directory}/to-engine")
        self._from_engine = context.socket(zmq.PULL)
        self._from_engine.setsockopt(zmq.RCVHWM, 0)
        self._descriptor = int(self._from_engine.getsockopt(zmq.FD))
        self._from_engine.bind(f"ipc://{self._directory}/from-engine")
        self._loop.add_reader(self._descriptor, self._receive)
        try:
            self._process = await EngineProcess.start(args, self._directory, program)
        except OSError:
            self._close()
            raise
        self._watch = self._loop.create_task(self._watch_process(self._process))

    def send(self, message: ToEngine) -> None:
        self._outbox.append(_encode(message))
        self._flush()

    def kill(self) -> None:
        """End the process at once; `on_finish` follows."""
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        """End an engine that was sent Shutdown, by force if need be; remove what `start` made."""
        if self._process is not None:
            self._watch.cancel()
            await self._process.end()
        self._close()

    def _flush(self) -> None:
        """Send what is queued. Messages are queued only while the engine is not yet connected."""
        while self._outbox and not self._closed:
            try:
                self._to_engine.send(self._outbox[0], zmq.NOBLOCK)
            except zmq.Again:
                self._loop.call_later(RESEND_SECONDS, self._flush)
                return
            self._outbox.popleft()

    def _receive(self) -> None:
        # The descriptor signals changes, not a state: read until there is nothing left.
        with contextlib.suppress(zmq.Again):
            while not self._closed:
                message = _decode(self._from_engine.recv(zmq.NOBLOCK))
                self._failed = isinstance(message, Failed)
                self._on_message(message)

    async def _watch_process(self, process: EngineProcess) -> None:
        status = await process.wait()
        report = self._read_watchdog_report()
        if status > 0 and not report:
            await self._wait_for_failure_message()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        reason = f"the engine process ended with {how}"
        if report:
            logger.error("the stacks of the engine when it was stuck:\n%s", report)
            reason = f"the engine was stuck in one step, {where(report)}"
        self._close()
        self._on_finish(reason)

    async def _wait_for_failure_message(self) -> None:
        """Read the engine's Failed message, which may arrive after the process has ended."""
        deadline = self._loop.time() + FAILURE_MESSAGE_SECONDS
        while not self._failed and self._loop.time() < deadline:
            self._receive()
            await asyncio.sleep(0.01)

    def _read_watchdog_report(self) -> str:
        """What the engine's watchdog wrote before it ended the process, if it did."""
        try:
            return (self._directory / REPORT).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._descriptor)
        self._to_engine.close(linger=0)
        self._from_engine.close(linger=0)
        self._scratch.remove()


def _socket_directory() -> ScratchDirectory:
    """A directory that only this user can enter, with a name short enough for a socket."""
    directory = ScratchDirectory()
    if len(str(directory.path)) > MAX_IPC_PATH:
        directory.remove()
        directory = ScratchDirectory(Path("/tmp"))
    return directory
