"""A gateway in this process, from its start to the signal that ends it."""

from __future__ import annotations

import asyncio

import click

from millrace.common.child_process import stop_signals
from millrace.gateway.app import Gateway
from millrace.gateway.processes.options import GatewayOptions
from millrace.gateway.processes.relay_server import freeze_garbage_collector


async def serve(options: GatewayOptions, drain: float) -> None:
    """Run until SIGINT or SIGTERM, then give running requests `drain` seconds; a second signal
    ends them at once."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop_or_hurry() -> None:
        (hurry if stop.is_set() else stop).set()  # asked twice: do not wait

    for number in stop_signals():
        loop.add_signal_handler(number, stop_or_hurry)
    relay = Gateway(options)
    await relay.start()
    freeze_garbage_collector()
    members = relay.monitor.members
    scheme = "https" if options.ssl_certfile else "http"
    several = f", {options.processes} processes" if options.processes > 1 else ""
    click.echo(
        f"gateway on {scheme}://{options.host}:{relay.port}, {relay.healthy} of {len(members)} "
        f"replicas healthy, policy {options.policy}{several}"
    )
    await stop.wait()
    stopping = asyncio.create_task(relay.stop(drain))
    hurrying = asyncio.create_task(hurry.wait())
    await asyncio.wait([stopping, hurrying], return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        stopping.cancel()
        await asyncio.gather(stopping, return_exceptions=True)
        await relay.stop(0.0)
    hurrying.cancel()
