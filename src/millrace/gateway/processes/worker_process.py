"""What runs in each process of a gateway with several: `python -m` this, from processes.py.

Arguments: its part of the board, the descriptors of its channel and of the board, and the process
that it must not outlive. Options come as JSON on stdin.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from itertools import count

import msgspec
import uvloop

from millrace.common.child_process import end_with_parent
from millrace.gateway.admin.api import health_answer, is_own
from millrace.gateway.common.shared_counters import SharedCounters
from millrace.gateway.http.message import Answer, Request, error_answer
from millrace.gateway.processes.supervisor import (
    Channel,
    Down,
    Listening,
    Members,
    OwnReply,
    OwnRequest,
    Report,
    Stop,
)
from millrace.gateway.processes.worker import GatewayOptions, Worker, stay_as_they_are
from millrace.gateway.routing.replicas import ReplicaSet

_ANSWER_SECONDS = 10.0


class RemoteAdminApi:
    """A desk whose answers come over the channel, but for /health."""

    def __init__(self, channel: Channel, replicas: ReplicaSet) -> None:
        self._channel = channel
        self._replicas = replicas
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[Answer]] = {}

    def owns(self, request: Request) -> bool:
        return is_own(request)

    async def answer(self, request: Request) -> Answer:
        if request.path.partition(b"?")[0] == b"/health":
            return health_answer(self._replicas)
        number = next(self._numbers)
        waiter = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._channel.send(OwnRequest(number, request))
        try:
            return await asyncio.wait_for(waiter, _ANSWER_SECONDS)
        except TimeoutError:
            return error_answer(503, "the gateway's main process does not answer", retry_after=1)
        finally:
            del self._waiting[number]

    def reply(self, message: OwnReply) -> None:
        """An answer has come."""
        waiter = self._waiting.get(message.number)
        if waiter is not None and not waiter.done():
            waiter.set_result(message.answer)


async def _run(index: int, channel_fd: int, board_fd: int, options: GatewayOptions) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=channel_fd))
    channel = Channel(reader, writer, Down)
    counters = SharedCounters(options.processes, board_fd)
    desks: list[RemoteAdminApi] = []

    def make_desk(replicas: ReplicaSet) -> RemoteAdminApi:
        desks.append(RemoteAdminApi(channel, replicas))
        return desks[0]

    worker = Worker(
        options, counters, index, make_desk, lambda id, reason: channel.send(Report(id, reason))
    )
    drain, listening = 0.0, False
    while (message := await channel.receive()) is not None:
        if isinstance(message, Members):
            worker.replicas.apply(message.members)
            if not listening:
                await worker.start(shared_port=True)
                listening = True
                stay_as_they_are()
                channel.send(Listening())
        elif isinstance(message, OwnReply):
            desks[0].reply(message)
        elif isinstance(message, Stop):
            drain = message.drain
            break
    await worker.stop(drain)


def main() -> None:
    index, channel_fd, board_fd, parent = map(int, sys.argv[1:])
    end_with_parent(parent)
    # Whoever stops a whole session means the main process, which tells us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    options = msgspec.json.decode(sys.stdin.buffer.read(), type=GatewayOptions)
    uvloop.run(_run(index, channel_fd, board_fd, options))


if __name__ == "__main__":
    main()
