"""Replicas on this host behind one port: started, watched, restarted, stopped together.

The order is: every replica on a port of its own, wait until each is healthy, then the gateway on
the public port. A replica that dies later is restarted after a pause that doubles with each death
in a row; the gateway sends nothing to it meanwhile. The command is any that takes --host and
--port and answers GET /health.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Sequence

import msgspec
import uvloop

from millrace.common.backoff import Backoff, BackoffPolicy
from millrace.common.http_client import Target
from millrace.common.sockets import free_port, require_free_port
from millrace.errors import ConfigError
from millrace.fleet.device_assignment import (
    Device,
    device_shares,
    thread_limit,
    usable_cores,
    visible_gpus,
)
from millrace.fleet.replica_process import ReplicaProcess, bring_up
from millrace.gateway.app import Gateway, GatewayOptions
from millrace.gateway.health.health_monitor import ReplicaSpec

_LOOPBACK = "127.0.0.1"


class FleetOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to run, how often, and where.

    command: starts one replica when `--host H --port P` is added. start_timeout, grace: seconds
    until all are healthy, and for a replica to end when asked. restarts: the pauses before a
    replica that ended is started again. hung: a replica that has answered no health check for so
    long is killed. drain: what requests under way get when all is to stop. gateway: how it picks
    and who it lets in; its replicas, host and port are set here.
    """

    command: Sequence[str]
    count: int
    host: str = "127.0.0.1"
    port: int = 8000
    gateway: GatewayOptions = GatewayOptions(merge_metrics=True)
    device: Device = "auto"
    gpus_each: int = 1
    start_timeout: float = 900.0
    grace: float = 15.0
    restarts: BackoffPolicy = BackoffPolicy(first=1.0, longest=30.0, settled=60.0)
    hung: float = 60.0
    drain: float = 10.0


class Supervisor:
    """The replicas and the gateway of one host, in the running event loop."""

    def __init__(self, options: FleetOptions, log: Callable[[str], None]) -> None:
        if options.count < 1:
            raise ConfigError(f"--replicas {options.count}: use 1 or more")
        self._options = options
        self._log = log
        environments = device_shares(
            options.count,
            device=options.device,
            gpus=visible_gpus(),
            cores=usable_cores(),
            gpus_each=options.gpus_each,
            threads=thread_limit(),
        )
        self._targets = [Target(_LOOPBACK, free_port(_LOOPBACK)) for _ in range(options.count)]
        self._processes = [
            ReplicaProcess(
                (*options.command, "--host", target.host, "--port", str(target.port)),
                environment,
                self._prefixed(index),
            )
            for index, (target, environment) in enumerate(
                zip(self._targets, environments, strict=True)
            )
        ]
        self._keepers: list[asyncio.Task[None]] = []
        self.gateway = Gateway(
            msgspec.structs.replace(
                options.gateway,
                replicas=[ReplicaSpec(target=target) for target in self._targets],
                labels={str(target): str(index) for index, target in enumerate(self._targets)},
                host=options.host,
                port=options.port,
            ),
            log,
        )

    async def start(self) -> None:
        """Bring everything up. Raises UserError, with all stopped again, when it does not come."""
        try:
            # A taken port is to be known now, not after the weights have been loaded.
            require_free_port(self._options.host, self._options.port)
            async with asyncio.TaskGroup() as starting:
                for index, process in enumerate(self._processes):
                    starting.create_task(
                        bring_up(
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
        self._keepers = [asyncio.create_task(self._keep(i)) for i in range(self._options.count)]
        self._keepers.append(asyncio.create_task(self._kill_hung()))

    async def stop(self) -> None:
        """Stop the gateway, once requests under way have ended or their time is over, then every
        replica; returns with all of them reaped."""
        for monitor in self._keepers:
            monitor.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await self.gateway.stop(self._options.drain)
        await asyncio.gather(*(p.stop(self._options.grace) for p in self._processes))

    def kill(self) -> None:
        """Kill every replica at once."""
        for process in self._processes:
            process.kill()

    @property
    def pids(self) -> list[int]:
        """Process ids of the replicas, in order."""
        return [process.pid for process in self._processes]

    def _prefixed(self, index: int) -> Callable[[str], None]:
        return lambda line: self._log(f"[replica {index}] {line}")

    # --- staying up ----------------------------------------------------------------------------

    async def _keep(self, index: int) -> None:
        """Restart one replica whenever it ends."""
        process, options = self._processes[index], self._options
        backoff = Backoff(options.restarts)
        while True:
            began = time.monotonic()
            status = await process.wait()
            pause = backoff.failed(time.monotonic() - began)
            self._log(f"replica {index} ended with status {status}; restarting in {pause:g} s")
            process.kill()  # what it left in its session
            await asyncio.sleep(pause)
            await process.start()  # it ran before, so its command can be run

    async def _kill_hung(self) -> None:
        """Kill replicas that have answered and do no more; `_keep` restarts them."""
        since: dict[int, float] = {}
        answered: dict[int, int] = {}  # replica -> the process of it that was seen to serve
        while True:
            await asyncio.sleep(min(1.0, self._options.hung / 4))
            now = time.monotonic()
            for index, member in enumerate(self.gateway.monitor.members[: self._options.count]):
                process = self._processes[index]
                if member.state == "up" and process.running:
                    answered[index] = process.pid
                silent = member.lost and process.running and answered.get(index) == process.pid
                if not silent:
                    since.pop(index, None)
                elif now - since.setdefault(index, now) > self._options.hung:
                    self._log(f"replica {index} has been silent for {self._options.hung:g} s")
                    process.kill()
                    del since[index]


def run_replicas(
    command: Sequence[str],
    count: int,
    host: str,
    port: int,
    *,
    gateway: GatewayOptions | None = None,
    device: Device = "auto",
    gpus_each: int = 1,
    start_timeout: float = 900.0,
    grace: float = 15.0,
) -> None:
    """Run `count` replicas of `command` behind host:port until SIGINT or SIGTERM.

    command: starts one replica when `--host H --port P` is added; it must not hold these itself.
    device "auto" gives each replica `gpus_each` GPUs where there are any, else a share of the
    cores. start_timeout: seconds until all are healthy. grace: seconds that a replica has to end.
    Lines of replicas go to stderr, prefixed.
    Returns after a clean stop. Raises UserError when the replicas cannot be brought up.
    """
    options = FleetOptions(
        command=list(command),
        count=count,
        host=host,
        port=port,
        gateway=gateway or GatewayOptions(merge_metrics=True),
        device=device,
        gpus_each=gpus_each,
        start_timeout=start_timeout,
        grace=grace,
    )
    uvloop.run(_run(options))


async def _run(options: FleetOptions) -> None:
    supervisor = Supervisor(options, _to_stderr)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop_or_kill() -> None:
        if stop.is_set():
            supervisor.kill()  # asked twice: do not wait
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop_or_kill)
    starting = asyncio.create_task(supervisor.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return
    starting.result()
    _to_stderr(
        f"{options.count} replicas on http://{options.host}:{supervisor.gateway.port}, "
        f"policy {options.gateway.policy}"
    )
    try:
        await stopping
    finally:
        await supervisor.stop()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
