"""`millrace gateway`: replicas that already run, behind one port; and what tells of it."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import click
import uvloop

from millrace.errors import UserError
from millrace.gateway.admin.status import show_status
from millrace.gateway.app import Gateway, GatewayOptions
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.health.discovery import parse_spec
from millrace.gateway.health.health_monitor import HealthPolicy, ReplicaSpec
from millrace.gateway.processes.worker import stay_as_they_are
from millrace.gateway.proxy_config import RENDERERS, render
from millrace.gateway.relay.access import Access
from millrace.gateway.routing.policies import DEFAULT_POLICY, POLICIES

_LIMITS, _HEALTH = GatewayLimits(), HealthPolicy()


@click.group(invoke_without_command=True)
@click.option(
    "--worker-urls",
    multiple=True,
    help="URLs of replicas, repeated or with commas; URL;weight=2;limit=64;models=a for more.",
)
@click.option("--worker-file", help="File with a replica a line, watched.")
@click.option("--worker-dns", multiple=True, help="name:port; every address of it is a replica.")
@click.option("--worker-api-key", help="Key that replicas ask for.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=8000, show_default=True, help="0 takes a free one.")
@click.option("--processes", type=int, default=1, show_default=True, help="Processes that relay.")
@click.option(
    "--policy", type=click.Choice(list(POLICIES)), default=DEFAULT_POLICY, show_default=True
)
@click.option(
    "--affinity-gap",
    type=int,
    default=4096,
    show_default=True,
    help="prefix_aware: tokens by which a replica may lead the least loaded one.",
)
@click.option(
    "--max-concurrent-requests", type=int, default=_LIMITS.max_in_flight, show_default=True
)
@click.option("--max-concurrent-batch", type=int, default=_LIMITS.max_batch, show_default=True)
@click.option("--max-requests-per-replica", type=int, default=0, help="0: any number.")
@click.option("--queue-size", type=int, default=_LIMITS.queue, show_default=True)
@click.option("--batch-queue-size", type=int, default=_LIMITS.batch_queue, show_default=True)
@click.option("--queue-timeout", type=float, default=_LIMITS.queue_timeout, help="Seconds.")
@click.option(
    "--request-timeout", type=float, default=_LIMITS.timeout, help="Seconds without a byte."
)
@click.option("--max-body-bytes", type=int, default=_LIMITS.max_body, show_default=True)
@click.option(
    "--max-bodies-bytes",
    type=int,
    default=_LIMITS.all_bodies,
    show_default=True,
    help="Bytes of all bodies that a process holds, those of requests under way among them.",
)
@click.option(
    "--max-kept-bytes",
    type=int,
    default=_LIMITS.max_kept,
    show_default=True,
    help="Bytes of a stream kept to continue it elsewhere; above, it cannot be. 0: never.",
)
@click.option("--health-check-interval", type=float, default=_HEALTH.interval, show_default=True)
@click.option("--health-check-timeout", type=float, default=_HEALTH.timeout, show_default=True)
@click.option(
    "--idle-probe",
    type=float,
    default=_HEALTH.idle_probe,
    show_default=True,
    help="Seconds after which an idle replica must complete a token; 0: never.",
)
@click.option("--slow-start", type=float, default=_HEALTH.slow_start, help="Seconds.")
@click.option(
    "--load-interval", type=float, default=_HEALTH.load_interval, help="Seconds; 0: none."
)
@click.option("--api-key", multiple=True, help="Key that clients need; may be repeated.")
@click.option("--api-key-file", help="File with a key a line.")
@click.option("--admin-key", help="Key for changes; without one they must come from this host.")
@click.option("--ssl-certfile", help="Certificate (PEM) for https.")
@click.option("--ssl-keyfile", help="Its key.")
@click.option("--access-log", help="File for a line of JSON a request; - for stderr.")
@click.option("--merge-metrics", is_flag=True, help="/metrics has those of the replicas too.")
@click.option("--drain-timeout", type=float, default=30.0, show_default=True, help="Seconds.")
@click.pass_context
def gateway(ctx: click.Context, /, **flags: Any) -> None:
    """Spread requests over replicas, and relay what they answer."""
    if ctx.invoked_subcommand is None:
        uvloop.run(_serve(_options(flags), flags["drain_timeout"]))


@gateway.command()
@click.argument("url", default="http://127.0.0.1:8000")
@click.option("--interval", type=float, default=1.0, show_default=True, help="Seconds.")
@click.option("--once", is_flag=True, help="Print one table and end.")
@click.option(
    "--api-key", envvar="MILLRACE_API_KEY", help="Key of the gateway's API, or for changes."
)
def status(url: str, interval: float, once: bool, api_key: str | None) -> None:
    """Show a running gateway's replicas, live."""
    show_status(url, interval, once, api_key)


@gateway.command(name="render")
@click.argument("kind", type=click.Choice(list(RENDERERS)))
@click.option("--worker-urls", multiple=True, required=True, help="As of `millrace gateway`.")
@click.option("--host", default="0.0.0.0", show_default=True)
@click.option("--port", type=int, default=8000, show_default=True)
def render_command(kind: str, worker_urls: tuple[str, ...], host: str, port: int) -> None:
    """Print a configuration of another proxy that only balances."""
    click.echo(render(kind, _specs(worker_urls), host, port), nl=False)


def _specs(texts: tuple[str, ...]) -> list[ReplicaSpec]:
    # A comma separates URLs, but also the models of one: those come behind a semicolon.
    return [
        parse_spec(one.split(";"), "flags", "--worker-urls")
        for text in texts
        for one in (text if ";" in text else text.replace(",", " ")).split()
    ]


def _options(flags: dict[str, Any]) -> GatewayOptions:
    specs = _specs(flags["worker_urls"])
    if not specs and not flags["worker_file"] and not flags["worker_dns"]:
        raise UserError("--worker-urls: name at least one replica, as http://127.0.0.1:8001")
    for name in ("max_concurrent_requests", "max_concurrent_batch", "max_body_bytes"):
        if flags[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} {flags[name]}: use 1 or more")
    if flags["max_bodies_bytes"] < flags["max_body_bytes"]:
        raise UserError(
            f"--max-bodies-bytes {flags['max_bodies_bytes']}: use at least --max-body-bytes, "
            f"{flags['max_body_bytes']}, or a body of that size is never taken"
        )
    return GatewayOptions(
        replicas=specs,
        host=flags["host"],
        port=flags["port"],
        processes=flags["processes"],
        policy=flags["policy"],
        affinity_gap=flags["affinity_gap"],
        limits=_limits(flags),
        health=HealthPolicy(
            interval=flags["health_check_interval"],
            timeout=flags["health_check_timeout"],
            idle_probe=flags["idle_probe"],
            slow_start=flags["slow_start"],
            load_interval=flags["load_interval"],
        ),
        access=Access(
            api_keys=(*flags["api_key"], *_keys(flags["api_key_file"])),
            admin_key=flags["admin_key"],
            worker_key=flags["worker_api_key"],
        ),
        ssl_certfile=flags["ssl_certfile"],
        ssl_keyfile=flags["ssl_keyfile"],
        worker_file=flags["worker_file"],
        worker_dns=flags["worker_dns"],
        access_log=flags["access_log"],
        merge_metrics=flags["merge_metrics"],
    )


def _limits(flags: dict[str, Any]) -> GatewayLimits:
    return GatewayLimits(
        max_in_flight=flags["max_concurrent_requests"],
        max_batch=flags["max_concurrent_batch"],
        per_replica=flags["max_requests_per_replica"],
        queue=flags["queue_size"],
        batch_queue=flags["batch_queue_size"],
        queue_timeout=flags["queue_timeout"],
        timeout=flags["request_timeout"],
        max_body=flags["max_body_bytes"],
        all_bodies=flags["max_bodies_bytes"],
        max_kept=flags["max_kept_bytes"],
    )


def _keys(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--api-key-file {path}: {error.strerror}") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise UserError(f"--api-key-file {path}: it holds no key; write one a line")
    return keys


async def _serve(options: GatewayOptions, drain: float) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop_or_hurry() -> None:
        (hurry if stop.is_set() else stop).set()  # asked twice: do not wait

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop_or_hurry)
    relay = Gateway(options)
    await relay.start()
    stay_as_they_are()
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
