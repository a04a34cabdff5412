"""Replicas on this host behind one port: started, watched, restarted, replaced, stopped together.

Each replica starts on its own port; when all are healthy, the gateway opens the public port. A
replica that ends later is restarted after a delay that doubles with each end in a row; meanwhile
the gateway sends it nothing. The command can be any that takes --host and --port and answers GET
/health.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from millrace.common.backoff import Backoff, BackoffPolicy
from millrace.common.child_process import stop_signals
from millrace.common.http_client import Target
from millrace.common.safe_log import protect_standard_streams
from millrace.common.sockets import free_port, require_free_port
from millrace.common.tasks import restarted
from millrace.errors import ConfigError, UserError
from millrace.fleet.device_assignment import (
    Device,
    replica_environments,
    thread_limit,
    usable_cores,
    visible_gpus,
)
from millrace.fleet.machines import Machines
from millrace.fleet.replica_process import ReplicaProcess, start_and_wait_healthy
from millrace.fleet.rolling_update import GatewayReplica, Replaceable, RollingUpdate
from millrace.gateway.app import Gateway
from millrace.gateway.health.health_monitor import ReplicaSpec
from millrace.gateway.processes.options import GatewayOptions
from millrace.gateway.serve import how_to_try, log_draining
from millrace.logs.setup import REPLICA_VARIABLE, relay_line

logger = logging.getLogger("millrace.fleet")

_LOOPBACK = "127.0.0.1"


class FleetOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to run, how many times, and where. Times are seconds.

    command: starts one replica when `--host H --port P` is added. replica_host: where replicas
    listen; replica_port: the first one's port, from which they count up; None for free ones.
    machines_file: machines with replicas of their own (machines.py). start_timeout: until all
    replicas must be healthy. stop_timeout: for a replica to end when asked. restarts: delays before
    a replica that ended is started again. hang_timeout: a replica that has answered no health check
    for so long is killed. drain_timeout: for running requests when all is to stop. gateway: the
    gateway's options; its replicas, host and port are set here. environment: variables of the
    replicas, besides this process's own.
    """

    command: Sequence[str]
    count: int
    host: str = "127.0.0.1"
    port: int = 8000
    gateway: GatewayOptions = GatewayOptions(merge_metrics=True)
    replica_host: str = _LOOPBACK
    replica_port: int | None = None
    machines_file: str | None = None
    device: Device = "auto"
    gpus_per_replica: int = 1
    start_timeout: float = 900.0
    stop_timeout: float = 15.0
    restarts: BackoffPolicy = BackoffPolicy(first=1.0, longest=30.0, settled=60.0)
    hang_timeout: float = 60.0
    drain_timeout: float = 10.0
    environment: dict[str, str] = {}


class Supervisor:
    """The replicas and the gateway of one host, in the running event loop.

    reread: gives the command of a rolling update, from wherever the first one came; None if it is
    always the same. on_line: called with a replica's name and each line that it writes.
    """

    def __init__(
        self,
        options: FleetOptions,
        log: Callable[[str], None] = logger.warning,
        reread: Callable[[], Sequence[str]] | None = None,
        on_line: Callable[[str, str], None] = relay_line,
    ) -> None:
        if options.count < 1 and options.machines_file is None:
            raise ConfigError(f"--replicas {options.count}: use 1 or more")
        self._options = options
        self._log = log
        self._reread = reread or (lambda: options.command)
        environments = replica_environments(
            options.count,
            device=options.device,
            gpus=visible_gpus(),
            cores=usable_cores(),
            gpus_per_replica=options.gpus_per_replica,
            threads=thread_limit(),
        )
        self._targets = [_replica_target(options, index) for index in range(options.count)]
        self._commands = [options.command] * options.count
        self._replacing: set[int] = set()  # these end because they are told to
        self._processes = [
            ReplicaProcess(
                _complete(options.command, target),
                {**options.environment, **environment, REPLICA_VARIABLE: f"replica {index}"},
                partial(on_line, f"replica {index}"),
            )
            for index, (target, environment) in enumerate(
                zip(self._targets, environments, strict=True)
            )
        ]
        self._tasks: list[asyncio.Task[None]] = []
        self.update = RollingUpdate(log, options.drain_timeout, options.start_timeout)
        self._machines: Machines | None = None
        if options.machines_file is not None:
            key = options.gateway.access.admin_key
            self._machines = Machines(Path(options.machines_file), key, log)
        self.gateway = Gateway(
            msgspec.structs.replace(
                options.gateway,
                replicas=[ReplicaSpec(target=target) for target in self._targets],
                labels={str(target): str(index) for index, target in enumerate(self._targets)},
                host=options.host,
                port=options.port,
            ),
            log,
            self,
            [self._machines] if self._machines is not None else [],
        )

    async def start(self) -> None:
        """Start everything. Raises UserError, with all stopped again, if that fails."""
        try:
            # A port in use must be noticed now, not after the weights have been loaded.
            require_free_port(self._options.host, self._options.port)
            async with asyncio.TaskGroup() as starting:
                for index, process in enumerate(self._processes):
                    starting.create_task(
                        start_and_wait_healthy(
                            process,
                            self._targets[index],
                            f"replica {index}",
                            self._options.start_timeout,
                        )
                    )
            await self.gateway.start()
        except BaseException as error:
            await self.stop()
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise
        self._tasks = [
            restarted(f"the restarts of replica {i}", partial(self._restart_loop, i), self._log)
            for i in range(self._options.count)
        ]
        self._tasks.append(restarted("the hang guard", self._kill_hung_loop, self._log))

    async def stop(self) -> None:
        """Stop the gateway when the running requests have ended or their time is over, then every
        replica. Returns with all of them reaped."""
        await self.update.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.gateway.stop(self._options.drain_timeout)
        await asyncio.gather(*(p.stop(self._options.stop_timeout) for p in self._processes))

    def kill(self) -> None:
        """Kill every replica at once."""
        for process in self._processes:
            process.kill()

    @property
    def pids(self) -> list[int]:
        """Process ids of the replicas, in order."""
        return [process.pid for process in self._processes]

    # --- restarts ------------------------------------------------------------------------------

    async def _restart_loop(self, index: int) -> None:
        """Restart one replica whenever it ends."""
        process, options = self._processes[index], self._options
        backoff = Backoff(options.restarts)
        while True:
            began = time.monotonic()
            status = await process.wait()
            if index in self._replacing:
                while index in self._replacing:
                    await asyncio.sleep(0.1)
                continue
            pause = backoff.failed(time.monotonic() - began)
            self.gateway.events.add(
                "ended", str(index), f"status {status}; restarting in {pause:g} s"
            )
            process.kill()  # what is left of its session
            await asyncio.sleep(pause)
            await process.start()  # it ran before, so its command can be run

    # --- rolling updates -----------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """How far the latest update is; the replicas of this host by number, and the machines."""
        machines = self._machines.document() if self._machines is not None else []
        here = [str(target) for target in self._targets]
        return {**self.update.document(), "replicas": here, "machines": machines}

    async def begin_update(self, only: int | None = None) -> None:
        """Start a rolling update; only: of this replica of this host. Raises UserError."""
        if only is not None and only >= self._options.count:
            raise UserError(
                f"there is no replica {only}; this host has {self._options.count}, counted from 0"
            )
        await self.update.begin(partial(self._replaceable, only))

    async def _replaceable(self, only: int | None) -> list[Replaceable]:
        command = await asyncio.to_thread(self._reread)
        holds = self._options.gateway.limits.hold_timeout > 0
        here: list[Replaceable] = [
            GatewayReplica(self.gateway, target, partial(self._replace, index, command), holds)
            for index, target in enumerate(self._targets)
            if only in (None, index)
        ]
        if only is not None or self._machines is None:
            return here
        return [*here, *await self._machines.replaceable(self.gateway, holds)]

    async def _replace(self, index: int, command: Sequence[str]) -> None:
        """Stop a replica and start it with a command, or, if it does not become healthy in
        start_timeout, with its old one again. Raises UserError then."""
        before = self._commands[index]
        try:
            await self._restart(index, command)
        except UserError as error:
            await self._restart(index, before)
            raise UserError(f"{error}; it runs its old command again") from error

    async def _restart(self, index: int, command: Sequence[str]) -> None:
        process, target = self._processes[index], self._targets[index]
        self._replacing.add(index)
        try:
            await process.stop(self._options.stop_timeout)
            process.command = _complete(command, target)
            self._commands[index] = command
            await start_and_wait_healthy(
                process, target, f"replica {index}", self._options.start_timeout
            )
        finally:
            self._replacing.discard(index)

    # --- silence -------------------------------------------------------------------------------

    async def _kill_hung_loop(self) -> None:
        """Kill replicas that were healthy and have stopped answering; `_restart_loop` restarts
        them."""
        since: dict[int, float] = {}
        answered: dict[int, int] = {}  # replica -> id of its process that was seen healthy
        while True:
            await asyncio.sleep(min(1.0, self._options.hang_timeout / 4))
            now = time.monotonic()
            for index, member in enumerate(self.gateway.monitor.members[: self._options.count]):
                process = self._processes[index]
                if member.state == "up" and process.running:
                    answered[index] = process.pid
                silent = member.lost and process.running and answered.get(index) == process.pid
                if not silent:
                    since.pop(index, None)
                elif now - since.setdefault(index, now) > self._options.hang_timeout:
                    why = f"silent for {self._options.hang_timeout:g} s"
                    self.gateway.events.add("killed", str(index), why)
                    process.kill()
                    del since[index]


def _replica_target(options: FleetOptions, index: int) -> Target:
    """Where a replica of this host listens."""
    host, first = options.replica_host, options.replica_port
    return Target(host, free_port(host) if first is None else first + index)


def _complete(command: Sequence[str], target: Target) -> tuple[str, ...]:
    return (*command, "--host", target.host, "--port", str(target.port))


def run_replicas(
    command: Sequence[str],
    count: int,
    host: str,
    port: int,
    *,
    gateway: GatewayOptions | None = None,
    device: Device = "auto",
    gpus_per_replica: int = 1,
    start_timeout: float = 900.0,
    stop_timeout: float = 15.0,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run `count` replicas of `command` behind host:port until SIGINT or SIGTERM.

    command: starts one replica when `--host H --port P` is added; it must not hold these itself.
    device "auto" gives each replica `gpus_per_replica` GPUs if there are any, else a share of the
    cores. start_timeout: seconds until all must be healthy. stop_timeout: seconds that a replica
    has to end. environment: more variables of the replicas. Their output goes to stderr, with a
    prefix. Returns after a clean stop. Raises UserError if the replicas cannot be started.
    """
    options = FleetOptions(
        command=list(command),
        count=count,
        host=host,
        port=port,
        gateway=gateway or GatewayOptions(merge_metrics=True),
        device=device,
        gpus_per_replica=gpus_per_replica,
        start_timeout=start_timeout,
        stop_timeout=stop_timeout,
        environment=dict(environment or {}),
    )
    protect_standard_streams()
    uvloop.run(run_until_stopped(options))


async def run_until_stopped(
    options: FleetOptions, reread: Callable[[], Sequence[str]] | None = None
) -> None:
    """Start everything, say so, and stop it at the first signal; the second one kills it."""
    supervisor = Supervisor(options, reread=reread)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop_or_kill() -> None:
        if stop.is_set():
            supervisor.kill()  # asked twice: do not wait
        stop.set()

    for number in stop_signals():
        loop.add_signal_handler(number, stop_or_kill)
    scheme = "https" if options.gateway.ssl_certfile else "http"
    logger.info(
        "%d replicas start; %s://%s:%d opens when all are healthy",
        options.count, scheme, options.host, options.port,
    )  # fmt: skip
    starting = asyncio.create_task(supervisor.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        logger.info("stopping before all replicas are healthy")
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return
    starting.result()
    url = f"{scheme}://{options.host}:{supervisor.gateway.port}"
    logger.info(
        "%d replicas on %s, policy %s%s",
        len(supervisor.gateway.monitor.members), url, options.gateway.policy,
        how_to_try(supervisor.gateway, url),
    )  # fmt: skip
    try:
        await stopping
        log_draining(supervisor.gateway, options.drain_timeout)
    finally:
        await supervisor.stop()
