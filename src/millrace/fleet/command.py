"""`millrace fleet`: replicas and their gateway on hosts without Kubernetes.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from millrace.common.flags import given, struct_options
from millrace.logs.setup import LOG_HELP, LogOptions

_URL = click.argument("url", default="http://127.0.0.1:8000")
_KEY = click.option("--api-key", envvar="MILLRACE_API_KEY", help="Key for changes to the gateway.")
_FILE = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))


@click.group()
def fleet() -> None:
    """Run replicas behind a gateway on this host or several, from files, and replace them."""


@fleet.command()
@_FILE
@struct_options(LogOptions, LOG_HELP)
def up(file: Path, **flags: Any) -> None:
    """Start what FILE describes, and keep it running until told to stop."""
    from millrace.fleet.run import run_fleet

    run_fleet(file, msgspec.convert(given(flags, LogOptions), LogOptions))


@fleet.command()
@_URL
@_KEY
@click.option("--once", is_flag=True, help="Print one table and end.")
@click.option("--interval", type=float, default=1.0, show_default=True, help="Seconds.")
def status(url: str, api_key: str | None, once: bool, interval: float) -> None:
    """Show the replicas of a running fleet, live."""
    from millrace.gateway.admin.status import show_status

    show_status(url, interval, once, api_key)


@fleet.command()
@click.argument("replica")
@_URL
@_KEY
@click.option("--undo", is_flag=True, help="Send it requests again.")
def drain(replica: str, url: str, api_key: str | None, undo: bool) -> None:
    """Send REPLICA no new requests.

    REPLICA is its id or its URL in the status, or a host: then all replicas of that machine.
    """
    from millrace.fleet.control import drain as drain_replicas

    for row in drain_replicas(url, api_key, replica, "undrain" if undo else "drain"):
        click.echo(f"{row['url']}: {row['state']}")


@fleet.command()
@_URL
@_KEY
@click.option("--replica", type=int, help="Only this one of the host's replicas, from 0 on.")
@click.option("--no-wait", is_flag=True, help="Return at once; `fleet status` shows the rest.")
def restart(url: str, api_key: str | None, replica: int | None, no_wait: bool) -> None:
    """Read the fleet's file again and replace its replicas one by one. No request is lost."""
    from millrace.fleet.control import call, follow

    only = "" if replica is None else f"?replica={replica}"
    call(url, "POST", f"/gateway/fleet/restart{only}", api_key)
    if not no_wait:
        follow(url, api_key, click.echo)


@fleet.command()
@_FILE
@click.option("--user", default=None, help="The unit's user [this one].")
def systemd(file: Path, user: str | None) -> None:
    """Print a systemd unit that keeps FILE's fleet running."""
    from millrace.fleet.systemd_unit import unit

    click.echo(unit(file, user), nl=False)
