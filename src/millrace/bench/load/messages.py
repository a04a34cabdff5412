"""The messages between a run and its load processes: msgpack frames over pipes.

To a process: its assignment, the order to open connections, the moment to begin, beacons (the time
at which each was written), the order to stop. Back: that it is ready, its progress, and at the end
everything that it recorded.
"""

from __future__ import annotations

import msgspec

from millrace.bench.load.options import BenchOptions
from millrace.bench.load.records import PackedRecords
from millrace.bench.workload.prompts import Lengths
from millrace.common.framing import Framing

_LONGEST = (1 << 32) - 1  # bytes of a frame: a report has every time of a run


class Assignment(msgspec.Struct, frozen=True, tag=True):
    """The run, and which part of it this process has."""

    options: BenchOptions
    model: str
    process: int
    processes: int
    limit: int | None


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Open the connections of the run, and answer Ready when they are open."""


class Go(msgspec.Struct, frozen=True, tag=True):
    """Begin at this moment (ns of the monotonic clock)."""

    begin_ns: int


class Beacon(msgspec.Struct, frozen=True, tag=True):
    """The time of writing. A chunk that arrived now would be read as late as this message."""

    at_ns: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Send no more requests, drop those in flight, send the report."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The last order is done (requests prepared, connections opened). lengths: of the prompts."""

    lengths: Lengths


class Progress(msgspec.Struct, frozen=True, tag=True):
    """So far: requests started, ended, failed and in flight, output tokens, and the sum of TTFT
    in seconds over `timed` requests.

    tokens: those of ended requests, as counted, and of requests in flight, as estimated from the
    pieces of their answers that have arrived. seconds: since the run's beginning.
    """

    started: int = 0
    done: int = 0
    failed: int = 0
    in_flight: int = 0
    tokens: float = 0.0
    timed: int = 0
    ttft_sum: float = 0.0
    seconds: float = 0.0


class Report(msgspec.Struct, frozen=True, tag=True):
    """What was recorded, and what it cost this process.

    cpu_s, wall_s: from the moment of begin to the end of the last request. parse_s: of the CPU
    time, what reading ended answers took. read_ns, lag_ns: int64 bytes, when each beacon was read
    and how late that was.
    """

    batch: PackedRecords
    cpu_s: float
    wall_s: float
    parse_s: float
    read_ns: bytes
    lag_ns: bytes
    started: int


class Failure(msgspec.Struct, frozen=True, tag=True):
    """The process cannot go on. refused: because of the user's input, not of an error of ours."""

    message: str
    refused: bool


ToProcess = Assignment | Connect | Go | Beacon | Stop
FromProcess = Ready | Progress | Report | Failure
TO_PROCESS: Framing[ToProcess] = Framing(ToProcess, _LONGEST)
FROM_PROCESS: Framing[FromProcess] = Framing(FromProcess, _LONGEST)
