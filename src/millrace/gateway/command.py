"""`millrace gateway`: its flags, and the commands `status` and `render`.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import click
import msgspec

from millrace.common.api_keys import configured_keys, keys_of_file
from millrace.common.flags import given, struct_options
from millrace.common.safe_log import protect_standard_streams
from millrace.errors import UserError
from millrace.gateway.common.limits import GatewayLimits, ScalePolicy
from millrace.gateway.common.replica_spec import HealthPolicy, ReplicaSpec
from millrace.gateway.processes.options import (
    ACCESS_HELP,
    GATEWAY_HELP,
    HEALTH_HELP,
    LIMITS_HELP,
    SCALE_HELP,
    GatewayOptions,
)
from millrace.gateway.proxy_config import RENDERERS, render
from millrace.gateway.relay.access import Access
from millrace.logs.setup import LOG_HELP, LogOptions, set_up_logs

_NEXT_URL = re.compile(r",(?=https?://|\[[0-9a-fA-F:]+\]|\d+\.\d+\.\d+\.\d+:\d)")


def _without_help(kind: type[msgspec.Struct], help: Mapping[str, str]) -> frozenset[str]:
    """Fields of `kind` that no flag sets."""
    return frozenset(kind.__struct_fields__) - frozenset(help)


_NO_FLAGS = _without_help(GatewayOptions, GATEWAY_HELP)


@click.group(invoke_without_command=True)
@click.option(
    "--worker-urls",
    multiple=True,
    help="URLs of replicas, repeated or with commas; URL;weight=2;limit=64;models=a for more.",
)
@struct_options(GatewayOptions, GATEWAY_HELP, skip=_NO_FLAGS)
@struct_options(GatewayLimits, LIMITS_HELP, skip=_without_help(GatewayLimits, LIMITS_HELP))
@struct_options(ScalePolicy, SCALE_HELP)
@struct_options(HealthPolicy, HEALTH_HELP, skip=_without_help(HealthPolicy, HEALTH_HELP))
@struct_options(Access, ACCESS_HELP)
@struct_options(LogOptions, LOG_HELP)
@click.option("--api-key-file", help="File with one key for clients per line.")
@click.option(
    "--drain-timeout",
    type=float,
    default=30.0,
    show_default=True,
    help="Seconds that running requests get when the gateway is told to stop.",
)
@click.pass_context
def gateway(ctx: click.Context, /, **flags: Any) -> None:
    """Spread requests over replicas and relay their responses."""
    if ctx.invoked_subcommand is None:
        options = _options(flags)
        protect_standard_streams()
        set_up_logs("gateway", msgspec.convert(given(flags, LogOptions), LogOptions))
        import uvloop

        from millrace.gateway.serve import serve

        uvloop.run(serve(options, flags["drain_timeout"]))


@gateway.command()
@click.argument("url", default="http://127.0.0.1:8000")
@click.option("--interval", type=float, default=1.0, show_default=True, help="Seconds.")
@click.option("--once", is_flag=True, help="Print one table and end.")
@click.option(
    "--api-key", envvar="MILLRACE_API_KEY", help="Key of the gateway's API, or for changes."
)
def status(url: str, interval: float, once: bool, api_key: str | None) -> None:
    """Show a running gateway's replicas, live."""
    from millrace.gateway.admin.status import show_status

    show_status(url, interval, once, api_key)


@gateway.command(name="render")
@click.argument("kind", type=click.Choice(list(RENDERERS)))
@click.option("--worker-urls", multiple=True, required=True, help="As for `millrace gateway`.")
@click.option("--host", default="0.0.0.0", show_default=True)
@click.option("--port", type=int, default=8000, show_default=True)
def render_command(kind: str, worker_urls: tuple[str, ...], host: str, port: int) -> None:
    """Print a configuration of another proxy, which only balances load."""
    click.echo(render(kind, replica_specs(worker_urls), host, port), nl=False)


def replica_specs(texts: Sequence[str]) -> list[ReplicaSpec]:
    """The replicas that --worker-urls names. Raises UserError."""
    from millrace.gateway.health.discovery import parse_spec

    # A comma separates URLs; behind a semicolon also the models of one replica.
    return [
        parse_spec(one.split(";"), "flags", "--worker-urls")
        for text in texts
        for one in (_NEXT_URL.sub(" ", text) if ";" in text else text.replace(",", " ")).split()
    ]


def _options(flags: dict[str, Any]) -> GatewayOptions:
    specs = replica_specs(flags["worker_urls"])
    if not specs and not flags["worker_file"] and not flags["worker_dns"]:
        raise UserError("--worker-urls: name at least one replica, as http://127.0.0.1:8001")
    access = given(flags, Access)
    file = flags["api_key_file"]
    file_keys = [] if file is None else keys_of_file(file, "--api-key-file")
    access["api_key"] = [*configured_keys(access.get("api_key", ()), "--api-key"), *file_keys]
    options = msgspec.convert(given(flags, GatewayOptions), GatewayOptions)
    return msgspec.structs.replace(
        options,
        replicas=specs,
        limits=msgspec.convert(given(flags, GatewayLimits), GatewayLimits),
        scale=msgspec.convert(given(flags, ScalePolicy), ScalePolicy),
        health=msgspec.convert(given(flags, HealthPolicy), HealthPolicy),
        access=msgspec.convert(access, Access),
    )
