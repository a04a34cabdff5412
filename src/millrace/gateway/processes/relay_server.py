"""One gateway process's relay: it listens, publishes counters and closes silent clients.

It is the same in a gateway of one process, next to the health monitor, and in one of several, where
the health monitor is in the main process. It does not know which.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path

from millrace.common.safe_log import stderr_line
from millrace.common.sockets import BACKLOG, listen, listen_unix, tls_context
from millrace.common.tasks import restarted
from millrace.errors import UserError
from millrace.gateway.common.shared_counters import SharedCounters
from millrace.gateway.http.message import Via
from millrace.gateway.processes.options import GatewayOptions
from millrace.gateway.relay.access_log import AccessLog
from millrace.gateway.relay.client_connection import ClientConnection
from millrace.gateway.relay.relay import AdminHandler, Relay
from millrace.gateway.routing.admission import AdmissionControl
from millrace.gateway.routing.policies import make_policy
from millrace.gateway.routing.prefix_index import PrefixTable
from millrace.gateway.routing.replicas import ReplicaSet
from millrace.gateway.routing.suspects import Outcome

_PUBLISH_SECONDS = 0.5
_SWEEP_EVERY = 4  # times _PUBLISH_SECONDS


class RelayServer:
    """A listening relay in the running event loop, between `start` and `stop`."""

    def __init__(
        self,
        options: GatewayOptions,
        counters: SharedCounters,
        index: int,
        admin: Callable[[ReplicaSet], AdminHandler],
        report: Callable[[int, Outcome], None],
        log: Callable[[str], None] = stderr_line,
    ) -> None:
        process_counters = counters.process_counters(index)
        self._options = options
        self._index = index
        self._log = log
        self.replicas = ReplicaSet(counters, process_counters, report, options.health.slow_start)
        policy = make_policy(
            options.policy, self.replicas, PrefixTable(counters.prefixes), options.affinity_gap
        )
        self._access_log = AccessLog(options.access_log, log) if options.access_log else None
        self.relay = Relay(
            self.replicas,
            policy,
            options.limits,
            admin(self.replicas),
            admission=AdmissionControl(counters, process_counters, options.limits),
            access=options.access,
            log=self._access_log.write if self._access_log else None,
        )
        self._servers: list[asyncio.Server] = []
        self._unix_path: Path | None = None
        self._chores: asyncio.Task[None] | None = None
        self.port = self.admin_port = 0

    async def start(self, *, shared_port: bool = False) -> None:
        """Listen. shared_port: other processes listen there too. Raises UserError if taken."""
        options = self._options
        context = tls_context(options.ssl_certfile, options.ssl_keyfile)
        listeners = listen(options.host, options.port, shared=shared_port)
        self.port = listeners[0].getsockname()[1]
        await self._serve(listeners, "public", context)
        if options.admin_port is not None:
            listeners = listen(options.admin_host, options.admin_port, shared=shared_port)
            self.admin_port = listeners[0].getsockname()[1]
            await self._serve(listeners, "admin", context)
        if options.admin_uds is not None and self._index == 0:  # one process can have it
            listener = listen_unix(options.admin_uds, "--admin-uds")
            self._unix_path = Path(options.admin_uds)
            await self._serve([listener], "unix", None)
        self._chores = restarted("the periodic work of the gateway", self._do_chores, self._log)

    async def _serve(
        self, listeners: Sequence[socket.socket], via: Via, context: ssl.SSLContext | None
    ) -> None:
        loop = asyncio.get_running_loop()
        for listener in listeners:
            server = await loop.create_server(
                lambda: ClientConnection(self.relay, via),
                sock=listener,
                backlog=BACKLOG,
                ssl=context,
            )
            self._servers.append(server)

    async def stop(self, drain: float = 0.0) -> None:
        """Accept no new connection, give running requests `drain` seconds, then close the rest."""
        for server in self._servers:
            server.close()
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)
        if self._servers:
            await self.relay.drain(drain)
        if self._chores is not None:
            self._chores.cancel()
            self.relay.publish()
        self.relay.close()
        if self._access_log is not None:
            self._access_log.close()
        await asyncio.sleep(0)  # let the closed connections say so

    async def _do_chores(self) -> None:
        turn = 0
        while True:
            await asyncio.sleep(_PUBLISH_SECONDS)
            self.relay.publish()
            turn += 1
            if turn % _SWEEP_EVERY == 0:
                self.relay.sweep()
                if self._access_log is not None:
                    self._access_log.flush()


def freeze_garbage_collector() -> None:
    """Exclude all current objects from garbage collection: they live as long as the process, and
    traversing them would delay streams."""
    gc.collect()
    gc.freeze()


def check_access_log(path: str | None) -> None:
    """Raise UserError when the access log cannot be written."""
    if path not in (None, "-"):
        try:
            with Path(str(path)).open("a", encoding="utf-8"):
                pass
        except OSError as error:
            raise UserError(f"--access-log {path}: {error.strerror}") from None
