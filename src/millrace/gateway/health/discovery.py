"""Where replicas come from, besides flags and the admin API: a watched file, a DNS name.

Each source gives the health monitor its complete list whenever that has changed. A source that
cannot be read keeps its last good list, and one log line says why.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, get_args

import msgspec

from millrace.common.http_client import Target, parse_base_url
from millrace.common.tasks import restarted
from millrace.errors import UserError
from millrace.gateway.common.replica_spec import Role
from millrace.gateway.health.health_monitor import HealthMonitor, ReplicaSpec


class Source(Protocol):
    """A list of replicas that may change."""

    name: str
    interval: float

    async def read(self) -> list[ReplicaSpec]:
        """The current list. Raises UserError or OSError if it cannot be read."""
        ...


class FileSource:
    """A file with one replica per line: a URL, then optionally `weight=`, `limit=`, `role=`
    and `models=` (with commas); `#` begins a comment. It is read every second."""

    interval = 1.0

    def __init__(self, path: Path) -> None:
        self.name = f"file {path}"
        self._path = path

    async def read(self) -> list[ReplicaSpec]:
        lines = self._path.read_text(encoding="utf-8").splitlines()
        specs = []
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if words:
                specs.append(parse_spec(words, self.name, f"{self._path}:{number}"))
        return specs


def parse_spec(words: Sequence[str], source: str, where: str) -> ReplicaSpec:
    """A ReplicaSpec from `URL key=value ...`. Raises UserError that begins with `where`."""
    values: dict[str, str] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or key not in ("weight", "limit", "models", "role"):
            raise UserError(f"{where}: {word!r}: use weight=, limit=, models= or role=")
        values[key] = value
    role = values.get("role", "")
    if role not in get_args(Role):
        raise UserError(f"{where}: role={role}: use prefill, decode or both")
    try:
        return ReplicaSpec(
            target=parse_base_url(words[0]),
            weight=float(values.get("weight", "1")),
            limit=int(values.get("limit", "0")),
            models=tuple(name for name in values.get("models", "").split(",") if name),
            role=msgspec.convert(role, Role),
            source=source,
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except ValueError:
        raise UserError(f"{where}: weight and limit are numbers") from None


class DnsSource:
    """Every address of a name, such as those of a headless Kubernetes service."""

    def __init__(self, host: str, port: int, interval: float = 5.0) -> None:
        self.name = f"DNS {host}"
        self.interval = interval
        self._host, self._port = host, port

    async def read(self) -> list[ReplicaSpec]:
        found = await asyncio.get_running_loop().getaddrinfo(
            self._host, self._port, type=socket.SOCK_STREAM
        )
        addresses = sorted({str(entry[4][0]) for entry in found})
        return [ReplicaSpec(target=Target(a, self._port), source=self.name) for a in addresses]


def parse_dns(text: str) -> DnsSource:
    """A DnsSource from `name:port`. Raises UserError for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--worker-dns {text!r}: use name:port, such as replicas.llm.svc:8000")
    return DnsSource(host, int(port))


class Discovery:
    """Keeps a health monitor in step with sources. log: takes a line if one cannot be read.
    patient: a name that has no addresses yet is no mistake: its replicas are still to come."""

    def __init__(
        self,
        monitor: HealthMonitor,
        sources: Sequence[Source],
        log: Callable[[str], None],
        *,
        patient: bool = False,
    ) -> None:
        self._monitor = monitor
        self._sources = sources
        self._log = log
        self._patient = patient
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Read every source once, then repeatedly in the background. Raises UserError if the first
        reading of one fails, because that is most likely a mistake."""
        for source in self._sources:
            try:
                self._monitor.sync(source.name, await source.read())
            except OSError as error:
                if self._patient and isinstance(error, socket.gaierror):
                    self._log(f"{source.name}: no address yet; it is asked for again")
                else:
                    raise UserError(f"{source.name}: {error.strerror or error}") from None
            work = partial(self._follow, source)
            self._tasks.append(restarted(f"the reading of {source.name}", work, self._log))

    async def stop(self) -> None:
        """End the background tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, source: Source) -> None:
        last_error = ""
        while True:
            await asyncio.sleep(source.interval)
            try:
                self._monitor.sync(source.name, await source.read())
                last_error = ""
            except (UserError, OSError) as error:
                if str(error) != last_error:
                    last_error = str(error)
                    self._log(f"{source.name}: {error}; the last list is kept")
