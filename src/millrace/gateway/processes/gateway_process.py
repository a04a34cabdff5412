"""The program of one gateway process, where a gateway has several.

Arguments: its part of the counters, the descriptors of its channel and of the counters, and the id
of the main process, with which it ends. Options and listeners come as JSON on stdin.
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
from millrace.common.safe_log import protect_standard_streams
from millrace.gateway.admin.api import health_reply, is_local_request
from millrace.gateway.common.shared_counters import SharedCounters
from millrace.gateway.http.message import LocalReply, Request, error_reply
from millrace.gateway.processes.listeners import close_listeners, inherit
from millrace.gateway.processes.relay_server import RelayServer, freeze_garbage_collector
from millrace.gateway.processes.supervisor import (
    AdminReply,
    AdminRequest,
    Channel,
    Cover,
    Down,
    Listening,
    Members,
    Report,
    Start,
    Stop,
)
from millrace.gateway.routing.replicas import ReplicaSet
from millrace.gateway.routing.suspects import Suspect
from millrace.logs.setup import set_up_logs

_ANSWER_SECONDS = 10.0


class RemoteAdminApi:
    """Local requests other than /health are answered by the main process, over the channel."""

    def __init__(self, channel: Channel, replicas: ReplicaSet) -> None:
        self._channel = channel
        self._replicas = replicas
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[LocalReply]] = {}

    def handles(self, request: Request) -> bool:
        return is_local_request(request)

    async def answer(self, request: Request) -> LocalReply:
        if request.path.partition(b"?")[0] == b"/health":
            return health_reply(self._replicas)
        number = next(self._numbers)
        waiter = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._channel.send(AdminRequest(number, request))
        try:
            return await asyncio.wait_for(waiter, _ANSWER_SECONDS)
        except TimeoutError:
            return error_reply(503, "the gateway's main process does not answer", retry_after=1)
        finally:
            del self._waiting[number]

    def reply(self, message: AdminReply) -> None:
        """A reply has come."""
        waiter = self._waiting.get(message.number)
        if waiter is not None and not waiter.done():
            waiter.set_result(message.answer)


async def _run(index: int, channel_fd: int, counters_fd: int, given: Start) -> None:
    options, listeners = given.options, inherit(given.listeners)
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=channel_fd))
    channel = Channel(reader, writer, Down)
    counters = SharedCounters(options.processes, counters_fd)
    admin_apis: list[RemoteAdminApi] = []

    def make_admin(replicas: ReplicaSet) -> RemoteAdminApi:
        admin_apis.append(RemoteAdminApi(channel, replicas))
        return admin_apis[0]

    relay_server = RelayServer(
        options, counters, index, make_admin, lambda id, outcome: channel.send(Report(id, outcome))
    )
    drain, listening = 0.0, False
    while (message := await channel.receive()) is not None:
        if isinstance(message, Members):
            relay_server.replicas.apply(message.members)
            if not listening:
                await relay_server.start(listeners[index])
                listening = True
                freeze_garbage_collector()
                channel.send(Listening())
        elif isinstance(message, AdminReply):
            admin_apis[0].reply(message)
        elif isinstance(message, Suspect):
            relay_server.relay.suspects.update(message)
        elif isinstance(message, Cover):
            for other in range(len(listeners)):
                if other in message.dead:
                    await relay_server.serve(other, listeners[other])
                elif other != index:
                    relay_server.cease(other)
        elif isinstance(message, Stop):
            drain = message.drain
            break
    close_listeners(*listeners)
    await relay_server.stop(drain)


def main() -> None:
    index, channel_fd, counters_fd, parent = map(int, sys.argv[1:])
    end_with_parent(parent)
    # The main process decides when to stop, also when Ctrl-C reaches the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    protect_standard_streams()
    set_up_logs(f"gateway {index}")
    given = msgspec.json.decode(sys.stdin.buffer.read(), type=Start)
    uvloop.run(_run(index, channel_fd, counters_fd, given))


if __name__ == "__main__":
    main()
