"""Requests of `millrace fleet` to the gateway of a running fleet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec

from millrace.common.http_client import fetch, parse_url
from millrace.errors import UserError

_POLL = 0.5


def call(url: str, method: str, path: str, key: str | None) -> dict[str, Any]:
    """The JSON object that a gateway answers. Raises UserError with its reason if it refuses."""
    target = parse_url(url)
    headers = (("Authorization", f"Bearer {key}"),) if key else ()
    try:
        response = asyncio.run(fetch(target, path, method=method, headers=headers, timeout=10.0))
    except OSError as error:
        raise UserError(f"{target}: no gateway answers ({error or 'timed out'})") from None
    try:
        answer = msgspec.json.decode(response.body, type=dict[str, Any])
    except msgspec.DecodeError:
        raise UserError(f"{target}: this is not a millrace gateway") from None
    if response.status >= 400:
        problem = answer.get("error", {}).get("message", f"answered {response.status}")
        raise UserError(f"{target}: {problem}")
    return answer


def follow(url: str, key: str | None, say: Callable[[str], object]) -> None:
    """Say how far a rolling update is until it ends. Raises UserError if it fails."""
    seen = -1
    while True:
        state = call(url, "GET", "/gateway/fleet", key)
        count = len(state["replicas"])
        if count != seen:
            say(f"{count} of {state['count']} replicas are replaced")
            seen = count
        if state["state"] == "failed":
            raise UserError(f"the update ended: {state['reason']}")
        if state["state"] != "running":
            return
        time.sleep(_POLL)
