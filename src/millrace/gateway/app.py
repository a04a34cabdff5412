"""The gateway as a whole: the health monitor, discovery, and one or several relay servers."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence

from millrace.batch.jobs.service import BatchService
from millrace.common.open_files import raise_file_limit
from millrace.common.tasks import restarted
from millrace.gateway.admin.api import AdminApi, FleetControl, health_reply, is_local_request
from millrace.gateway.admin.live_page import FleetPage
from millrace.gateway.admin.load_log import EVERY_SECONDS, LoadLog
from millrace.gateway.admin.scale import SAMPLE_SECONDS, ScaleAdvisor
from millrace.gateway.common.shared_counters import SharedCounters
from millrace.gateway.health.discovery import Discovery, FileSource, Source, parse_dns
from millrace.gateway.health.events import FleetEvents
from millrace.gateway.health.health_monitor import HealthMonitor
from millrace.gateway.http.message import LocalReply, Request
from millrace.gateway.processes.listeners import (
    Listener,
    close_listeners,
    open_listeners,
    port_of,
    remove_unix_socket,
)
from millrace.gateway.processes.options import GatewayOptions, batch_settings, check_options
from millrace.gateway.processes.relay_server import RelayServer, check_access_log
from millrace.gateway.processes.supervisor import GatewayProcesses
from millrace.gateway.relay.relay import Relay
from millrace.gateway.routing.policies import BY_PREFIX
from millrace.gateway.routing.replicas import Member, ReplicaSet
from millrace.version import __version__

__all__ = ["Gateway", "GatewayOptions"]

logger = logging.getLogger("millrace.gateway")


class Gateway:
    """A gateway in the running event loop, between `start` and `stop`.

    fleet: what runs replicas and can replace them. sources: of replicas, besides those of the
    options.
    """

    def __init__(
        self,
        options: GatewayOptions,
        log: Callable[[str], None] = logger.warning,
        fleet: FleetControl | None = None,
        sources: Sequence[Source] = (),
    ) -> None:
        check_options(options)
        check_access_log(options.access_log)
        self._options = options
        self._log = log
        self._admin_port = options.admin_port or 0
        self.counters = SharedCounters(options.processes)
        self.monitor = HealthMonitor(
            self.counters,
            options.health,
            options.access.worker_api_key,
            by_prefix=options.policy in BY_PREFIX,
            log=log,
        )
        self.events = FleetEvents(self._name)
        self.monitor.listeners.append(self.events.update)
        for spec in options.replicas:
            self.monitor.add(spec)
        sources = [*sources, *map(parse_dns, options.worker_dns)]
        if options.worker_file is not None:
            from pathlib import Path

            sources.append(FileSource(Path(options.worker_file)))
        self._discovery = Discovery(
            self.monitor, sources, log, patient=options.limits.hold_timeout > 0
        )
        self._scale = ScaleAdvisor(self.counters, lambda: self.monitor.members, options.scale)
        self._chores: list[asyncio.Task[None]] = []
        about = {"kind": "gateway", "name": f"gateway, {options.policy}", "version": __version__}
        self._live = FleetPage(
            self.counters, lambda: self.monitor.members, self._name, self.events, about
        )
        self.monitor.on_samples = self._live.add
        self._admin = AdminApi(
            self.counters,
            self.monitor,
            options.access,
            self._scale,
            self._live,
            fleet=fleet,
            policy=options.policy,
            merge=options.merge_metrics,
            label=self._name,
            workers=lambda: self.pids,
            restarts=lambda: self._processes.restarts if self._processes else 0,
        )
        self._batches = BatchService(batch_settings(options), log)
        self._relay_server: RelayServer | None = None
        self._listeners: list[Listener] = []  # of a gateway of one process
        self._processes: GatewayProcesses | None = None
        if options.processes == 1:
            self._relay_server = self._make_relay_server(log)
        else:
            self._processes = self._make_processes(log)

    def _make_relay_server(self, log: Callable[[str], None]) -> RelayServer:
        """The relay of a gateway of one process."""
        server = RelayServer(
            self._options,
            self.counters,
            0,
            lambda replicas: _LocalAdminApi(self._admin, replicas),
            self.monitor.report,
            log,
        )
        self.monitor.listeners.append(server.replicas.apply)
        self.monitor.suspect_listeners.append(server.relay.suspects.update)
        server.replicas.apply(self.monitor.members)
        return server

    def _make_processes(self, log: Callable[[str], None]) -> GatewayProcesses:
        """The processes of a gateway of several."""
        processes = GatewayProcesses(
            self._options, self.counters, self.monitor, self._admin.answer, log
        )
        self.monitor.listeners.append(processes.send_members)
        self.monitor.suspect_listeners.append(processes.send_suspect)
        return processes

    # --- one process only ------------------------------------------------------------------------

    @property
    def relay(self) -> Relay:
        """The relay of a gateway of one process."""
        assert self._relay_server is not None
        return self._relay_server.relay

    @property
    def replicas(self) -> ReplicaSet:
        """The replicas as the relay of a gateway of one process sees them."""
        return self.relay.replicas

    # --- start and stop --------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """The port it listens on; valid after `start`."""
        if self._relay_server is not None:
            return port_of(self._listeners, "public")
        assert self._processes is not None
        return self._processes.port

    @property
    def admin_port(self) -> int:
        """The port of the admin listener, once started; 0 without one."""
        if self._relay_server is not None:
            return port_of(self._listeners, "admin")
        return self._admin_port

    @property
    def pids(self) -> list[int]:
        """Ids of the gateway processes."""
        return [os.getpid()] if self._processes is None else self._processes.pids

    def _name(self, member: Member) -> str:
        """What people call a replica: its number where it runs here, else its address."""
        return self._options.labels.get(str(member.target), member.target.authority)

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return self.counters.gauge("interactive") + self.counters.gauge("batch")

    @property
    def healthy(self) -> int:
        """Replicas that take requests."""
        return sum(member.state == "up" for member in self.monitor.members)

    async def start(self) -> None:
        """Check every replica once, then listen and keep checking.

        Raises UserError when the port is taken, or a source of replicas cannot be read.
        """
        raise_file_limit()  # two connections a request
        try:
            await self._discovery.start()
            await self.monitor.start()
            self._chores.append(restarted("the samples of each second", self._sample, self._log))
            if not self._options.disable_log_stats:
                self._chores.append(restarted("the figures in the log", self._log_load, self._log))
            if self._relay_server is not None:
                (self._listeners,) = open_listeners(self._options)
                await self._relay_server.start(self._listeners)
            else:
                assert self._processes is not None
                await self._processes.start()
            keys = self._options.access.api_key
            self._batches.start(
                self._options.host, self.port, bool(self._options.ssl_certfile),
                keys[0] if keys else None,
            )  # fmt: skip
        except BaseException:
            await self.stop()
            raise

    async def _sample(self) -> None:
        while True:
            self._scale.sample()
            self._live.tick()
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _log_load(self) -> None:
        log = LoadLog(self.counters, lambda: self.monitor.members)
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            log.write()

    async def stop(self, drain: float = 0.0) -> None:
        """Close the port, give running requests `drain` seconds to end, then close the rest."""
        for task in self._chores:
            task.cancel()
        await self._batches.stop()  # they go on after the next start
        await self._discovery.stop()
        if self._relay_server is not None:
            close_listeners(self._listeners)
            if self._listeners:
                remove_unix_socket(self._options.admin_uds)
            await self._relay_server.stop(drain)
        if self._processes is not None:
            await self._processes.stop(drain)
        await self.monitor.stop()
        await asyncio.sleep(0)


class _LocalAdminApi:
    """The local requests of a gateway of one process."""

    def __init__(self, admin: AdminApi, replicas: ReplicaSet) -> None:
        self._admin = admin
        self._replicas = replicas

    def handles(self, request: Request) -> bool:
        return is_local_request(request)

    async def answer(self, request: Request) -> LocalReply:
        if request.path.partition(b"?")[0] == b"/health":
            return health_reply(self._replicas)
        return await self._admin.answer(request)
