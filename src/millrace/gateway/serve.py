"""A gateway in this process, from its start to the signal that ends it."""

from __future__ import annotations

import asyncio
import logging

from millrace.common.child_process import stop_signals
from millrace.gateway.app import Gateway
from millrace.gateway.processes.options import GatewayOptions
from millrace.gateway.processes.relay_server import freeze_garbage_collector
from millrace.logs.example_request import example_request

logger = logging.getLogger("millrace.gateway")


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
    logger.info(
        "gateway on %s://%s:%d, %d of %d replicas healthy, policy %s%s%s",
        scheme, options.host, relay.port, relay.healthy, len(members), options.policy, several,
        how_to_try(relay, f"{scheme}://{options.host}:{relay.port}"),
    )  # fmt: skip
    await stop.wait()
    log_draining(relay, drain)
    stopping = asyncio.create_task(relay.stop(drain))
    hurrying = asyncio.create_task(hurry.wait())
    await asyncio.wait([stopping, hurrying], return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        stopping.cancel()
        await asyncio.gather(stopping, return_exceptions=True)
        await relay.stop(0.0)
    hurrying.cancel()


def how_to_try(gateway: Gateway, url: str) -> str:
    """The end of the line that says that it is ready: a command to try, once a model is known."""
    cards = gateway.monitor.cards
    if not cards:
        return ""
    return f". Try:\n  {example_request(url, str(cards[0]['id']))}"


def log_draining(gateway: Gateway, limit: float) -> None:
    """Say what a first signal leads to. limit: seconds that running requests get."""
    logger.info(
        "stopping: %d requests are open and have %g s to end; a second signal ends them",
        gateway.running, limit,
    )  # fmt: skip
