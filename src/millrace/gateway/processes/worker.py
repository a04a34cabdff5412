"""One gateway process's share of the work: a relay that listens, and its chores.

The same in a gateway of one process, where it stands beside the keeper, and in one of several,
where the keeper is in another process (processes.py). It knows neither.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from millrace.common.sockets import BACKLOG, listen, tls_context
from millrace.errors import UserError
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.common.shared_counters import SharedCounters
from millrace.gateway.health.health_monitor import HealthPolicy, ReplicaSpec
from millrace.gateway.relay.access import Access
from millrace.gateway.relay.access_log import AccessLog
from millrace.gateway.relay.client_connection import ClientConnection
from millrace.gateway.relay.relay import AdminHandler, Relay
from millrace.gateway.routing.admission import AdmissionControl
from millrace.gateway.routing.policies import DEFAULT_POLICY, POLICIES, make_policy
from millrace.gateway.routing.prefix_index import PrefixTable
from millrace.gateway.routing.replicas import ReplicaSet

_PUBLISH_SECONDS = 0.5
_SWEEP_EVERY = 4  # of these


class GatewayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where to listen, what stands behind, and how to choose. port 0 takes any free one.

    processes: of the relay. affinity_gap: tokens by which prefix_aware lets a replica lead.
    worker_file, worker_dns: where more replicas come from. access_log: a file, "-" for stderr.
    merge_metrics: /metrics has the replicas' as well; labels: their names there, by URL.
    """

    replicas: Sequence[ReplicaSpec] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    processes: int = 1
    policy: str = DEFAULT_POLICY
    affinity_gap: int = 4096
    limits: GatewayLimits = GatewayLimits()
    health: HealthPolicy = HealthPolicy()
    access: Access = Access()
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    worker_file: str | None = None
    worker_dns: Sequence[str] = ()
    access_log: str | None = None
    merge_metrics: bool = False
    labels: dict[str, str] = {}


def check_options(options: GatewayOptions) -> None:
    """Raise UserError for what cannot work."""
    if options.policy not in POLICIES:
        raise UserError(f"--policy {options.policy!r}: use one of {', '.join(POLICIES)}")
    if not 1 <= options.processes <= 128:
        raise UserError(f"--processes {options.processes}: use 1 to 128")
    tls_context(options.ssl_certfile, options.ssl_keyfile)


class Worker:
    """A listening relay in the running event loop, between `start` and `stop`."""

    def __init__(
        self,
        options: GatewayOptions,
        counters: SharedCounters,
        index: int,
        admin: Callable[[ReplicaSet], AdminHandler],
        report: Callable[[int, str | None], None],
    ) -> None:
        part = counters.part(index)
        self._options = options
        self.replicas = ReplicaSet(counters, part, report, options.health.slow_start)
        policy = make_policy(
            options.policy, self.replicas, PrefixTable(counters.prefixes), options.affinity_gap
        )
        self._log = AccessLog(options.access_log) if options.access_log else None
        self.relay = Relay(
            self.replicas,
            policy,
            options.limits,
            admin(self.replicas),
            admission=AdmissionControl(counters, part, options.limits),
            access=options.access,
            log=self._log.write if self._log else None,
        )
        self._servers: list[asyncio.Server] = []
        self._chores: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self, *, shared_port: bool = False) -> None:
        """Listen. shared_port: other processes listen there too. Raises UserError if taken."""
        options = self._options
        listeners = listen(options.host, options.port, shared=shared_port)
        self.port = listeners[0].getsockname()[1]
        context = tls_context(options.ssl_certfile, options.ssl_keyfile)
        loop = asyncio.get_running_loop()
        for listener in listeners:
            server = await loop.create_server(
                lambda: ClientConnection(self.relay), sock=listener, backlog=BACKLOG, ssl=context
            )
            self._servers.append(server)
        self._chores = asyncio.create_task(self._do_chores())

    async def stop(self, drain: float = 0.0) -> None:
        """Take no new connection, let requests under way end for `drain` seconds, drop the rest."""
        for server in self._servers:
            server.close()
        if self._servers:
            await self.relay.drain(drain)
        if self._chores is not None:
            self._chores.cancel()
            self.relay.publish()
        self.relay.close()
        if self._log is not None:
            self._log.close()
        await asyncio.sleep(0)  # let the closed connections say so

    async def _do_chores(self) -> None:
        turn = 0
        while True:
            await asyncio.sleep(_PUBLISH_SECONDS)
            self.relay.publish()
            turn += 1
            if turn % _SWEEP_EVERY == 0:
                self.relay.sweep()
                if self._log is not None:
                    self._log.flush()


def stay_as_they_are() -> None:
    """Have garbage collections pass over every object that is there now: a process that has
    started keeps them, and walking through them would hold streams up."""
    gc.collect()
    gc.freeze()


def check_log_file(path: str | None) -> None:
    """Raise UserError when the access log cannot be written."""
    if path not in (None, "-"):
        try:
            with Path(str(path)).open("a", encoding="utf-8"):
                pass
        except OSError as error:
            raise UserError(f"--access-log {path}: {error.strerror}") from None
