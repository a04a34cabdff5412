"""The gateway as a whole: the relay on a port, the replicas watched, its own three paths.

/health is 200 while at least one replica takes requests, /metrics are the gateway's own,
/gateway/replicas tells how each replica is. Everything else is relayed.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence

import msgspec

from millrace.errors import UserError
from millrace.gateway.message import Answer, Request, answer, error_answer
from millrace.gateway.metrics import exposition
from millrace.gateway.picker import make_picker
from millrace.gateway.relay import ClientSide, Limits, Relay
from millrace.gateway.replicas import HealthPolicy, ReplicaSet
from millrace.http1 import Target


class GatewayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where to listen, what stands behind, and how to choose. port 0 takes any free one."""

    targets: Sequence[Target]
    host: str = "127.0.0.1"
    port: int = 8000
    policy: str = "round_robin"
    limits: Limits = Limits()
    health: HealthPolicy = HealthPolicy()


class Gateway:
    """A gateway in the running event loop, between `start` and `stop`."""

    def __init__(self, options: GatewayOptions) -> None:
        for target in options.targets:
            if target.prefix:
                raise UserError(f"{target}: a replica's URL has no path; give http://host:port")
        self._options = options
        self.replicas = ReplicaSet(options.targets, options.health)
        self.relay = Relay(
            self.replicas, make_picker(options.policy), options.limits, self._own_answer
        )
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        """Check every replica once, then listen and go on watching.

        Raises UserError when the port is taken.
        """
        loop, options = asyncio.get_running_loop(), self._options
        await asyncio.gather(*(self.replicas.check(r) for r in self.replicas.all))
        try:
            self._server = await loop.create_server(
                lambda: ClientSide(self.relay), options.host, options.port, backlog=4096
            )
        except OSError as error:
            raise _cannot_listen(options.host, options.port, error) from None
        self.port = self._server.sockets[0].getsockname()[1]
        self.replicas.start()

    async def stop(self) -> None:
        """Close the port and every connection."""
        if self._server is not None:
            self._server.close()
            await self.replicas.stop()
        self.relay.close()
        await asyncio.sleep(0)  # let the closed connections say so

    def _own_answer(self, request: Request) -> Answer | None:
        if request.method != b"GET":
            return None
        path = request.path.partition(b"?")[0]
        if path == b"/health":
            return self._health()
        if path == b"/metrics":
            return answer(200, exposition(self.relay), "text/plain; version=0.0.4")
        if path == b"/gateway/replicas":
            states = [replica.status() for replica in self.replicas.all]
            return answer(200, msgspec.json.encode({"replicas": states}))
        return None

    def _health(self) -> Answer:
        healthy = len(self.replicas.available())
        if not healthy:
            reason = self.replicas.describe_outage()
            return error_answer(503, f"no healthy replica: {reason}", retry_after=1)
        counts = {"healthy": healthy, "total": len(self.replicas.all)}
        return answer(200, msgspec.json.encode({"status": "ok", "replicas": counts}))


def require_free_port(host: str, port: int) -> None:
    """Raise UserError when nobody can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise _cannot_listen(host, port, error) from None


def _cannot_listen(host: str, port: int, error: OSError) -> UserError:
    why = "it is in use" if error.errno == errno.EADDRINUSE else str(error)
    return UserError(f"cannot listen on {host}:{port}: {why}; choose another --host or --port")
