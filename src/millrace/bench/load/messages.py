"""What a run and its load processes say to each other: msgpack frames over their pipes.

To a process: its assignment, the word to open
connections, the moment to begin, beacons (the time at which each was written), the order to stop.
Back: that it is ready, how far it is, and at last everything it recorded.
"""

from __future__ import annotations

import msgspec

from millrace.bench.load.options import BenchOptions
from millrace.bench.load.records import PackedRecords
from millrace.bench.workload.prompts import Lengths
from millrace.common.framing import Framing

_LONGEST = (1 << 32) - 1  # bytes: a report has every time of a run


class Assignment(msgspec.Struct, frozen=True, tag=True):
    """The run, and which part of it is this process' own."""

    options: BenchOptions
    model: str
    process: int
    processes: int
    limit: int | None


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Open the connections that the run will want, and say when they are."""


class Go(msgspec.Struct, frozen=True, tag=True):
    """Begin at this moment (ns of the monotonic clock)."""

    begin_ns: int


class Beacon(msgspec.Struct, frozen=True, tag=True):
    """Written at this moment: how late it is read is how late a chunk would have been."""

    at_ns: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Send no more, drop what is in flight, report."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Done with what was asked (requests made, connections opened); the lengths of the prompts."""

    lengths: Lengths


class Progress(msgspec.Struct, frozen=True, tag=True):
    """So far: requests started, ended, failed and in flight, output tokens, and the sum of TTFT
    in seconds over `timed` requests."""

    started: int = 0
    done: int = 0
    failed: int = 0
    in_flight: int = 0
    tokens: int = 0
    timed: int = 0
    ttft_sum: float = 0.0


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
    """The process cannot go on; refused: for what the user gave, and not for a fault of ours."""

    message: str
    refused: bool


ToProcess = Assignment | Connect | Go | Beacon | Stop
FromProcess = Ready | Progress | Report | Failure
TO_PROCESS: Framing[ToProcess] = Framing(ToProcess, _LONGEST)
FROM_PROCESS: Framing[FromProcess] = Framing(FromProcess, _LONGEST)
