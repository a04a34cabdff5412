"""The access log: one line of JSON per request, with client, path, replica and times."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from io import FileIO
from typing import Protocol

import msgspec

from millrace.common.safe_log import LineWriter
from millrace.gateway.http.message import Request
from millrace.gateway.http.request_info import RequestInfo
from millrace.gateway.relay.spans import RequestSpans
from millrace.gateway.routing.load_account import LoadAccount
from millrace.gateway.routing.replicas import Replica

_BATCH = 64  # lines of one write
_LONGEST = 512


class LoggedRequest(Protocol):
    """A finished request (exchange.py). began: by `time.perf_counter()`. first_byte: seconds from
    then, None if none came. retries: on other replicas before the first byte."""

    request: Request
    info: RequestInfo
    account: LoadAccount
    replica: Replica | None
    began: float
    first_byte: float | None
    retries: int
    spans: RequestSpans

    @property
    def resumptions(self) -> int:
        """How often its stream was resumed on another replica."""
        ...


class AccessLog:
    """Appends to a file, or to stderr for "-". Lines are buffered until `flush`; each write holds
    complete lines, so that several processes can share a file. It never raises and never blocks:
    lines that cannot be written are lost, which is counted and reported (common/safe_log.py).

    log: takes a line when writing begins to fail. Raises OSError if the file cannot be opened.
    """

    def __init__(self, path: str, log: Callable[[str], None]) -> None:
        self._file = FileIO(path, "ab") if path != "-" else None
        self._writer = LineWriter(
            self._file.fileno() if self._file is not None else sys.stderr.fileno(),
            notice=_notice,
            on_failure=lambda reason: log(
                f"access log {path}: {reason}; lines are lost until it can be written again"
            ),
        )
        self._lines: list[bytes] = []

    def write(self, exchange: LoggedRequest, status: int) -> None:
        """Add a line for a finished request. Times in ms; status 499: the client left."""
        request, info, now = exchange.request, exchange.info, time.perf_counter()
        first = exchange.first_byte
        line = {
            "time": round(time.time(), 3),
            "id": request.id.decode("latin-1"),
            "client": request.peer,
            "method": request.method.decode("latin-1"),
            "path": _short(request.path.decode("latin-1")),
            "status": status,
            "class": info.service_class,
            "model": _short(info.model),
            "stream": info.stream,
            "replica": str(exchange.replica.target) if exchange.replica else None,
            "prompt_tokens": info.prompt_tokens if info.for_text else None,
            "chunks": exchange.account.chunks,
            "bytes": exchange.account.bytes,
            "first_byte_ms": None if first is None else round(first * 1e3, 2),
            "total_ms": round((now - exchange.began) * 1e3, 2),
            "retries": exchange.retries,
            "resumed": exchange.resumptions,
        }
        if exchange.spans.trace_id:
            line["trace"] = exchange.spans.trace_id
        self._lines.append(msgspec.json.encode(line) + b"\n")
        if len(self._lines) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Write the buffered lines."""
        if self._lines:
            data, self._lines = b"".join(self._lines), []
            self._writer.write(data)

    def close(self) -> None:
        """Write the last lines."""
        self.flush()
        self._writer.close()
        if self._file is not None:
            self._file.close()


def _short(text: str | None) -> str | None:
    """At most _LONGEST characters of a text that the client chose."""
    if text is None or len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}... ({len(text)} characters)"


def _notice(lost: int, reason: str) -> bytes:
    """The line of the log that reports lost lines."""
    return msgspec.json.encode({"time": round(time.time(), 3), "lost": lost, "why": reason}) + b"\n"
