"""What a replica says of its own load, asked a few times a second over one connection.

A millrace replica answers GET /load from the front's own books, without asking its engine. Of a
vllm replica, whose /metrics cost it more, two gauges are read once a second. Who picks by prefixes
also asks a millrace replica which ones came since the last time.
"""

from __future__ import annotations

import asyncio
import contextlib
import re

import msgspec

from millrace.common.http_client import Connection, Response, Target, connect, encode_request
from millrace.common.prefix_hash import PrefixReport
from millrace.gateway.http.request_info import Kind

_TIMEOUT = 1.0
_VLLM_PAUSE = 1.0
_UNKNOWN_PAUSE = 30.0
_GAUGE = re.compile(rb"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([0-9.e+]+)", re.M)


class LoadReport(msgspec.Struct, frozen=True):
    """requests: open in the replica. tokens: of these, prompt and output so far; None unknown.
    prefixes: where they were asked for, and it keeps any."""

    requests: int
    tokens: int | None = None
    prefixes: PrefixReport | None = None

    def correction(self, counted: int, requests: int) -> int:
        """Tokens by which what the gateway counted (tokens, requests) is wrong."""
        if self.tokens is not None:
            return self.tokens - counted
        strangers = max(0, self.requests - requests)
        return strangers * (counted // requests if requests else 512)


_DECODER = msgspec.json.Decoder(LoadReport)


class LoadReports:
    """Asks one replica, again and again."""

    def __init__(self, target: Target, headers: tuple[tuple[str, str], ...]) -> None:
        self._target = target
        self._connection: Connection | None = None
        self._headers = headers
        self._pause = 0.0

    def pause(self, interval: float) -> float:
        """Seconds until the next question."""
        return max(interval, self._pause)

    def close(self) -> None:
        """Drop the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def info(self, kind: Kind, prefixes_since: str | None = None) -> LoadReport | None:
        """Its report; None when it gives none now. prefixes_since: a cursor; None asks for none."""
        path = "/metrics" if kind == "vllm" else "/load"
        if kind == "millrace" and prefixes_since is not None:
            path += f"?prefixes_since={prefixes_since}"
        try:
            async with asyncio.timeout(_TIMEOUT):
                response = await self._get(path)
        except OSError:
            self.close()
            return None
        if response.status != 200 or response.error is not None:
            self._pause = _UNKNOWN_PAUSE if response.status == 404 else _VLLM_PAUSE
            return None
        self._pause = _VLLM_PAUSE if kind == "vllm" else 0.0
        if kind == "vllm":
            found = [float(value) for value in _GAUGE.findall(response.body)]
            return LoadReport(int(sum(found))) if found else None
        with contextlib.suppress(msgspec.DecodeError):
            return _DECODER.decode(response.body)
        return None

    async def _get(self, path: str) -> Response:
        if self._connection is None or not self._connection.open or self._connection.busy:
            self.close()
            self._connection = await connect(self._target)
        question = encode_request(self._target, "GET", path, headers=self._headers)
        return await self._connection.send(question)
