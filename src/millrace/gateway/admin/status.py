"""`millrace gateway status`: a running gateway's replicas as a table in the terminal, live."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from millrace.common.http_client import parse_url
from millrace.errors import UserError
from millrace.gateway.admin.client import ask

_COLOURS = {"up": "green", "draining": "yellow", "down": "red"}


def show_status(url: str, interval: float, once: bool, key: str | None = None) -> None:
    """Draw the table every `interval` seconds until interrupted, or once.

    Raises UserError if nothing answers there, or something other than a gateway.
    """
    if interval <= 0:
        raise UserError(f"--interval {interval:g}: use a number of seconds above 0")
    console = Console()
    now = asyncio.run(read_status(url, key))
    if once:
        console.print(draw(now, None, 1.0))
        return
    with Live(draw(now, None, 1.0), console=console, refresh_per_second=4) as live:
        while True:
            began = time.monotonic()
            time.sleep(interval)
            then, now = now, asyncio.run(read_status(url, key))
            live.update(draw(now, then, time.monotonic() - began))


async def read_status(url: str, key: str | None = None) -> dict[str, Any]:
    """The status of the gateway there. Raises UserError."""
    status, answer = await ask(url, "/gateway/status", key)
    if status == 401:
        raise UserError(f"{parse_url(url)}: this gateway needs a key; give it with --api-key")
    if status != 200:
        raise UserError(
            f"{parse_url(url)}: this is not a millrace gateway; give the URL of the gateway itself"
        )
    return answer


def draw(now: dict[str, Any], then: dict[str, Any] | None, seconds: float) -> Group:
    """The table; rates are since `then`, `seconds` ago."""
    table = Table(title=_title(now), title_justify="left", expand=False, box=SIMPLE, padding=0)
    table.add_column("replica", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("open", "tokens", "picks", "req/s", "tok/s", "failed", "weight"):
        table.add_column(name, justify="right", no_wrap=True)
    before = {row["id"]: row for row in then["replicas"]} if then else {}
    for row in now["replicas"]:
        old = before.get(row["id"], row)
        table.add_row(
            row["url"].removeprefix("http://"),
            Text(row["state"], style=_COLOURS[row["state"]]),
            str(row["in_flight"]),
            f"{row['load_tokens']:,}",
            f"{row['picks']:,}",
            f"{(row['picks'] - old['picks']) / seconds:.1f}",
            f"{(row['relayed_chunks'] - old['relayed_chunks']) / seconds:,.0f}",
            str(row["failures"]),
            f"{row['weight']:g}",
        )
    ailing = [f"{row['url']}: {row['reason']}" for row in now["replicas"] if row["reason"]]
    return Group(table, *(Text(line, style="red") for line in ailing))


def _title(now: dict[str, Any]) -> str:
    live, events = now["live"], now["events"]
    answered = sum(now["answers"].values())
    return (
        f"{now['policy']}, {len(now['workers'])} process(es); {live['interactive']} interactive "
        f"and {live['batch']} batch running, {live['queued_interactive'] + live['queued_batch']} "
        f"queued; {answered:,} answered, {events['retries']} retried, {events['resumed']} resumed, "
        f"{events['cut_off']} cut off"
    )
