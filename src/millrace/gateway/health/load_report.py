"""Load reports of a replica, read a few times a second over one connection.

A millrace replica answers GET /load in its server process, without asking its engine. Of a vllm
replica, whose /metrics costs more, two gauges are read once a second. With a prefix policy a
millrace replica is also asked which prefixes came since the last report.
"""

from __future__ import annotations

import asyncio
import contextlib
import re

import msgspec

from millrace.common.http_client import Connection, Response, Target, connect, encode_request
from millrace.common.prefix_hash import PrefixReport
from millrace.dashboard.sample import Sample
from millrace.gateway.common.shared_counters import IN_FLIGHT, RESIDENT, SharedCounters
from millrace.gateway.health.vllm_samples import VllmSamples
from millrace.gateway.http.request_info import Kind

_TIMEOUT = 1.0
_VLLM_INTERVAL = 1.0
_UNSUPPORTED_INTERVAL = 30.0
_GAUGE = re.compile(rb"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([0-9.e+]+)", re.M)


class LoadReport(msgspec.Struct, frozen=True):
    """requests: running in the replica. tokens: of these, prompt and output so far; None if
    unknown. prefixes: if they were asked for and it keeps any. samples: of its last seconds, if
    they were asked for."""

    requests: int
    tokens: int | None = None
    prefixes: PrefixReport | None = None
    samples: list[Sample] = []

    def correction(self, counted: int, requests: int) -> int:
        """Tokens to add to what the gateway counted (tokens, requests)."""
        if self.tokens is not None:
            return self.tokens - counted
        unknown_requests = max(0, self.requests - requests)
        return unknown_requests * (counted // requests if requests else 512)


_DECODER = msgspec.json.Decoder(LoadReport)


def correct_load(
    counters: SharedCounters, slot: int, report: LoadReport, tokens: int, requests: int
) -> None:
    """Correct a replica's counted load by its report. tokens, requests: what was counted when the
    report was asked for."""
    counted = (tokens + counters.replica_total(slot, RESIDENT)) // 2
    most_requests = max(requests, counters.replica_total(slot, IN_FLIGHT))
    target = report.correction(counted, most_requests)
    # Half way each time: a request that is on its way is not in the report yet.
    counters.set_load_correction(slot, (counters.load_correction(slot) + target) // 2)


class LoadReports:
    """Reads the reports of one replica."""

    def __init__(self, target: Target, headers: tuple[tuple[str, str], ...]) -> None:
        self._target = target
        self._connection: Connection | None = None
        self._headers = headers
        self._min_delay = 0.0
        self._vllm = VllmSamples()

    def next_delay(self, interval: float) -> float:
        """Seconds until the next report is to be read."""
        return max(interval, self._min_delay)

    def close(self) -> None:
        """Drop the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def read(
        self, kind: Kind, prefixes_since: str | None = None, samples_since: int | None = None
    ) -> LoadReport | None:
        """Its report; None if there is none now. prefixes_since: a cursor; None: no prefixes.
        samples_since: the second of the newest sample that is known; None: no samples."""
        path = "/metrics" if kind == "vllm" else "/load"
        if kind == "millrace":
            asked = {"prefixes_since": prefixes_since, "samples_since": samples_since}
            query = "&".join(
                f"{name}={value}" for name, value in asked.items() if value is not None
            )
            path += f"?{query}" if query else ""
        try:
            async with asyncio.timeout(_TIMEOUT):
                response = await self._get(path)
        except OSError:
            self.close()
            return None
        if response.status != 200 or response.error is not None:
            self._min_delay = _UNSUPPORTED_INTERVAL if response.status == 404 else _VLLM_INTERVAL
            return None
        self._min_delay = _VLLM_INTERVAL if kind == "vllm" else 0.0
        if kind == "vllm":
            found = [float(value) for value in _GAUGE.findall(response.body)]
            samples = self._vllm.read(response.body)
            return LoadReport(int(sum(found)), samples=samples) if found else None
        with contextlib.suppress(msgspec.DecodeError):
            return _DECODER.decode(response.body)
        return None

    async def _get(self, path: str) -> Response:
        if self._connection is None or not self._connection.open or self._connection.busy:
            self.close()
            self._connection = await connect(self._target)
        request = encode_request(self._target, "GET", path, headers=self._headers)
        return await self._connection.send(request)
