"""One gateway process's relay: it accepts clients, publishes counters, closes silent connections.

It is the same in a gateway of one process, next to the health monitor, and in one of several, where
the health monitor is in the main process. It does not know which.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from pathlib import Path

from millrace.batch.jobs.service import open_api
from millrace.common.sockets import BACKLOG, tls_context
from millrace.common.tasks import restarted
from millrace.errors import UserError
from millrace.gateway.admin.batches import WithBatches
from millrace.gateway.common.shared_counters import SharedCounters
from millrace.gateway.processes.listeners import ListenerSet
from millrace.gateway.processes.options import GatewayOptions, batch_settings
from millrace.gateway.relay.access_log import AccessLog
from millrace.gateway.relay.client_connection import ClientConnection
from millrace.gateway.relay.relay import AdminHandler, Relay
from millrace.gateway.relay.spans import RequestTracer
from millrace.gateway.routing.admission import AdmissionControl
from millrace.gateway.routing.policies import make_policy
from millrace.gateway.routing.prefix_index import PrefixTable
from millrace.gateway.routing.replicas import ReplicaSet
from millrace.gateway.routing.suspects import Outcome

logger = logging.getLogger("millrace.gateway")

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
        log: Callable[[str], None] = logger.warning,
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
            self._local_requests(admin),
            admission=AdmissionControl(counters, process_counters, options.limits),
            access=options.access,
            log=self._access_log.write if self._access_log else None,
            tracer=RequestTracer(options.otlp_traces_endpoint),
        )
        self._servers: dict[int, list[asyncio.Server]] = {}  # by the number of the listener set
        self._chores: asyncio.Task[None] | None = None

    def _local_requests(self, admin: Callable[[ReplicaSet], AdminHandler]) -> AdminHandler:
        """What answers requests that are not relayed."""
        handler, settings = admin(self.replicas), batch_settings(self._options)
        if settings is None:
            return handler
        return WithBatches(handler, open_api(settings), self._options.access)

    async def start(self, listeners: ListenerSet) -> None:
        """Accept connections at this process's own listeners."""
        await self.serve(self._index, listeners)
        self._chores = restarted("the periodic work of the gateway", self._do_chores, self._log)

    async def serve(self, number: int, listeners: ListenerSet) -> None:
        """Accept connections at the listener set of this number as well."""
        if number in self._servers:
            return
        options, loop = self._options, asyncio.get_running_loop()
        context = tls_context(options.ssl_certfile, options.ssl_keyfile)
        servers = self._servers[number] = []
        for listener in listeners:
            via = listener.via
            server = await loop.create_server(
                lambda via=via: ClientConnection(self.relay, via),
                sock=listener.socket.dup(),  # so that ours still listens once this server is closed
                backlog=BACKLOG,
                ssl=None if via == "unix" else context,
            )
            servers.append(server)

    def cease(self, number: int) -> None:
        """Accept no more connections at that listener set; those accepted go on."""
        for server in self._servers.pop(number, ()):
            server.close()

    async def stop(self, drain: float = 0.0) -> None:
        """Accept no new connection, give running requests `drain` seconds, then close the rest.

        The listeners are closed by whoever opened them, before this.
        """
        started = bool(self._servers)
        for number in list(self._servers):
            self.cease(number)
        if started:
            await self.relay.drain(drain)
        if self._chores is not None:
            self._chores.cancel()
            self.relay.publish()
        self.relay.close()
        if self._access_log is not None:
            self._access_log.close()
        await asyncio.to_thread(self.relay.tracer.close)
        await asyncio.sleep(0)  # let the closed connections say so

    async def _do_chores(self) -> None:
        turn = 0
        while True:
            await asyncio.sleep(_PUBLISH_SECONDS)
            self.relay.publish()
            turn += 1
            if turn % _SWEEP_EVERY == 0:
                self.relay.sweep()
                self.relay.rebalancer.look()
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
