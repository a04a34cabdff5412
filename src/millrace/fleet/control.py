"""Requests of `millrace fleet` to the gateway of a running fleet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from millrace.common.http_client import parse_url
from millrace.errors import UserError
from millrace.gateway.admin.client import ask

_POLL = 0.5


def call(url: str, method: str, path: str, key: str | None) -> dict[str, Any]:
    """The JSON object that a gateway answers. Raises UserError with its reason if it refuses."""
    status, answer = asyncio.run(ask(url, path, key, method=method, timeout=10.0))
    if status >= 400:
        problem = answer.get("error", {}).get("message", f"answered {status}")
        raise UserError(f"{parse_url(url)}: {problem}")
    return answer


def drain(url: str, key: str | None, which: str, change: str) -> list[dict[str, Any]]:
    """Drain or undrain the replicas that are meant: of an id, a URL or a host. Their new rows.

    Raises UserError if there is none, with what there is.
    """
    rows = call(url, "GET", "/gateway/replicas", key)["replicas"]
    meant = [r for r in rows if which in (str(r["id"]), r["url"], parse_url(r["url"]).host)]
    if not meant:
        known = ", ".join(f"{row['id']} ({row['url']})" for row in rows) or "none"
        raise UserError(f"no replica {which!r}; there are: {known}")
    return [call(url, "POST", f"/gateway/replicas/{row['id']}/{change}", key) for row in meant]


def follow(url: str, key: str | None, say: Callable[[str], object]) -> None:
    """Say how far a rolling update is until it ends. Raises UserError if it fails."""
    seen = -1
    while True:
        state = call(url, "GET", "/gateway/fleet", key)
        count = len(state["replaced"])
        if count != seen:
            say(f"{count} of {state['count']} replicas are replaced")
            seen = count
        if state["state"] == "failed":
            raise UserError(f"the update ended: {state['reason']}")
        if state["state"] != "running":
            return
        time.sleep(_POLL)
