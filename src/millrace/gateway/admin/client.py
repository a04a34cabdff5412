"""Requests to the local paths of a running gateway, for commands."""

from __future__ import annotations

from typing import Any

import msgspec

from millrace.common.http_client import fetch, parse_url
from millrace.errors import UserError


async def ask(
    url: str, path: str, key: str | None = None, *, method: str = "GET", timeout: float = 5.0
) -> tuple[int, dict[str, Any]]:
    """(status, JSON object) of the gateway there. key: of its API, or for changes. timeout:
    seconds. Raises UserError if nothing answers, or something other than a gateway."""
    target = parse_url(url)
    headers = (("Authorization", f"Bearer {key}"),) if key else ()
    try:
        response = await fetch(target, path, method=method, headers=headers, timeout=timeout)
        return response.status, msgspec.json.decode(response.body, type=dict[str, Any])
    except OSError as error:
        raise UserError(f"{target}: no gateway answers ({error or 'timed out'})") from None
    except msgspec.DecodeError:
        if response.status == 401:  # whoever says so
            return 401, {}
        raise UserError(
            f"{target}: this is not a millrace gateway; give the URL of the gateway itself"
        ) from None
