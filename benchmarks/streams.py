"""Streams of completions for benchmarks that count lost requests: whole or lost, and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from millrace.common.http_client import Target, fetch


async def stream_while(
    target: Target,
    number: int,
    running: Callable[[], bool],
    ends: Counter[str],
    *,
    tokens: int = 128,
    **fields: Any,
) -> None:
    """One stream of `tokens` tokens after the other; ends: counts them, as `whole` or `lost: WHY`.
    number: makes this client's prompt different. fields: more of each request's body."""
    body = {"prompt": f"What is {number} plus 7?", "max_tokens": tokens, "stream": True}
    body |= {"temperature": 0, "ignore_eos": True, **fields}
    encoded = json.dumps(body).encode()
    while running():
        try:
            response = await fetch(
                target, "/v1/completions", method="POST", body=encoded, timeout=180
            )
        except OSError as error:
            ends[f"lost: {error}"] += 1
            continue
        whole = response.status == 200 and response.body.endswith(b"data: [DONE]\n\n")
        ends["whole" if whole else f"lost: {response.status} {response.body[-200:]!r}"] += 1
