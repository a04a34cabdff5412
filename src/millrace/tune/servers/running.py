"""What a visit knows of the server that it started, and what all visits have in common.

How a server is started is not known here, and what is run on it neither.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import msgspec

from millrace.common.http_client import Target
from millrace.tune.servers.load import LoadPlan
from millrace.tune.space.knobs import Space
from millrace.tune.trials.failures import Failure, LogReader
from millrace.tune.trials.outcome import Visit

MOST_LOG = 4 << 20  # characters of a server's output that are kept or read


class Visits(msgspec.Struct, frozen=True, kw_only=True):
    """What the visits of a study have in common. start_limit: seconds until a server must be
    healthy. logs: folder of the servers' output. stop: ends the visit that is under way."""

    space: Space
    plan: LoadPlan
    start_limit: float = 900.0
    logs: Path
    stop: asyncio.Event | None = None


class RunningServer:
    """A server of a visit: where it is, what it wrote, whether it has ended."""

    def __init__(self, target: Target, reader: LogReader) -> None:
        self.target = target
        self.reader = reader
        self.ended = asyncio.Event()
        self.status: int | None = None


class StartError(Exception):
    """A server did not start. failure: why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


class Servers(Protocol):
    """What starts the servers of visits."""

    def started(self, visit: Visit) -> AbstractAsyncContextManager[RunningServer]:
        """A context with the server of a visit, healthy. Raises StartError on entry."""
        ...


def not_healthy(reader: LogReader, limit: float) -> Failure:
    """Why a server that goes on was not healthy in time, as far as its log says."""
    if reader.seen:
        return reader.failure("start")
    return Failure("hang", "start", f"it was not healthy within {limit:g} s")
