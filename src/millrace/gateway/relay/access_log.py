"""The access log: one line of JSON per request, with client, path, replica and times."""

from __future__ import annotations

import sys
import time
from io import FileIO
from typing import BinaryIO, Protocol

import msgspec

from millrace.gateway.http.message import Request
from millrace.gateway.http.request_info import RequestInfo
from millrace.gateway.routing.load_account import LoadAccount
from millrace.gateway.routing.replicas import Replica


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

    @property
    def resumptions(self) -> int:
        """How often its stream was resumed on another replica."""
        ...


class AccessLog:
    """Appends to a file, or to stderr for "-". Lines are buffered until `flush`; each write holds
    complete lines, so that several processes can share a file."""

    def __init__(self, path: str) -> None:
        self._file: BinaryIO | FileIO = sys.stderr.buffer
        if path != "-":
            self._file = FileIO(path, "ab")
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
            "path": request.path.decode("latin-1"),
            "status": status,
            "class": info.service_class,
            "model": info.model,
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
        self._lines.append(msgspec.json.encode(line) + b"\n")
        if len(self._lines) >= 64:
            self.flush()

    def flush(self) -> None:
        """Write the buffered lines."""
        if self._lines:
            data, self._lines = b"".join(self._lines), []
            self._file.write(data)
            self._file.flush()

    def close(self) -> None:
        """Write the last lines."""
        self.flush()
        if self._file is not sys.stderr.buffer:
            self._file.close()
