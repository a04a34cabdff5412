"""`millrace gateway`: replicas that already run, behind one port."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import click
import uvloop

from millrace.errors import UserError
from millrace.gateway.app import Gateway, GatewayOptions
from millrace.gateway.picker import POLICIES
from millrace.gateway.relay import Limits
from millrace.gateway.replicas import HealthPolicy
from millrace.http1 import parse_url


@click.command()
@click.option("--worker-urls", multiple=True, help="URLs of replicas, repeated or with commas.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=8000, show_default=True)
@click.option(
    "--policy", type=click.Choice(list(POLICIES)), default="round_robin", show_default=True
)
@click.option("--max-concurrent-requests", type=int, default=16384, show_default=True)
@click.option("--request-timeout", type=float, default=600.0, help="Seconds without a byte.")
@click.option("--health-check-interval", type=float, default=1.0, show_default=True)
@click.option("--health-check-timeout", type=float, default=5.0, show_default=True)
def gateway(**flags: Any) -> None:
    """Spread requests over replicas, and relay what they answer."""
    urls = [url for text in flags["worker_urls"] for url in text.replace(",", " ").split()]
    if not urls:
        raise UserError("--worker-urls: name at least one replica, as http://127.0.0.1:8001")
    options = GatewayOptions(
        targets=[parse_url(url) for url in urls],
        host=flags["host"],
        port=flags["port"],
        policy=flags["policy"],
        limits=Limits(
            max_in_flight=flags["max_concurrent_requests"], timeout=flags["request_timeout"]
        ),
        health=HealthPolicy(
            interval=flags["health_check_interval"], timeout=flags["health_check_timeout"]
        ),
    )
    uvloop.run(_serve(options))


async def _serve(options: GatewayOptions) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    relay = Gateway(options)
    await relay.start()
    healthy = len(relay.replicas.available())
    click.echo(
        f"gateway on http://{options.host}:{relay.port}, {healthy} of {len(options.targets)} "
        f"replicas healthy, policy {options.policy}"
    )
    await stop.wait()
    await relay.stop()
