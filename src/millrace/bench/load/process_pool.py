"""The load processes of one run: started together, watched, reaped.

Each process has a share of the workload and of the concurrency. All begin at the same moment of the
host's monotonic clock, and their raw records are pooled. While they send, a beacon (the time) is
written to each every few ms. The delay with which a process reads a beacon shows how late it reads
its clock when a chunk arrives.
"""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from time import perf_counter_ns
from typing import Any

import msgspec

from millrace.bench.load.interrupts import unless_stopped
from millrace.bench.load.messages import (
    FROM_PROCESS,
    TO_PROCESS,
    Assignment,
    Beacon,
    Connect,
    Failure,
    FromProcess,
    Go,
    Progress,
    Ready,
    Report,
    Stop,
    ToProcess,
)
from millrace.bench.load.options import BenchOptions
from millrace.bench.load.records import RequestTiming, unpack
from millrace.bench.workload.prompts import Lengths, merge_lengths
from millrace.common.child_process import kill_process, python_module
from millrace.errors import UserError

COMMAND = tuple(python_module("millrace.bench.load.load_process"))
_BEACON_S = 0.004  # mean interval between two beacons of a process
_PREPARE_LIMIT_S = 600.0  # time for a process to prepare its requests
_SILENCE_LIMIT_S = 60.0  # a process reports its progress twice a second
_LEAD_NS = 50_000_000  # between the message to begin and the first request


class ProcessRecords(msgspec.Struct, frozen=True, kw_only=True):
    """What one process recorded, and what that cost: CPU and wall seconds, and the CPU seconds of
    parsing. read_ns, lag_ns: when each beacon was read, and how late, in ns."""

    records: list[RequestTiming]
    cpu_s: float
    wall_s: float
    parse_s: float
    read_ns: Sequence[int]
    lag_ns: Sequence[int]


class Outcome(msgspec.Struct, frozen=True):
    """What all processes recorded: `parts` by process, `records` pooled. started: requests sent,
    including those that were dropped."""

    parts: list[ProcessRecords]
    records: list[RequestTiming]
    started: int
    interrupted: bool


def split_limit(limit: int | None, processes: int) -> list[int | None]:
    """A limit on concurrency, divided over the processes as evenly as possible."""
    if limit is None:
        return [None] * processes
    return [limit // processes + (number < limit % processes) for number in range(processes)]


class _Process:
    """One load process and the pipes to it."""

    def __init__(self, number: int, process: asyncio.subprocess.Process) -> None:
        self._number, self._process = number, process
        self.progress = Progress()

    def send(self, message: ToProcess) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(TO_PROCESS.encode(message))

    async def receive(self, limit: float) -> FromProcess:
        """The next message. Raises UserError or RuntimeError when the process cannot go on."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(limit):
                message = await FROM_PROCESS.receive(self._process.stdout)
        except TimeoutError:
            raise RuntimeError(
                f"load process {self._number} sent nothing for {limit:g} s"
            ) from None
        except asyncio.IncompleteReadError:
            status = await self._process.wait()
            raise RuntimeError(f"load process {self._number} ended with {status}") from None
        if isinstance(message, Failure):
            raise (UserError if message.refused else RuntimeError)(message.message)
        return message

    async def ready(self) -> Lengths:
        message = await self.receive(_PREPARE_LIMIT_S)
        assert isinstance(message, Ready)
        return message.lengths

    async def report(self) -> Report:
        """Wait for the final report; `progress` is kept up to date until then."""
        while True:
            message = await self.receive(_SILENCE_LIMIT_S)
            if isinstance(message, Report):
                return message
            assert isinstance(message, Progress)
            self.progress = message

    async def beacons(self) -> None:
        """Write the time to the process at random intervals, without end."""
        while True:
            await asyncio.sleep(random.uniform(0.5, 1.5) * _BEACON_S)
            self.send(Beacon(perf_counter_ns()))

    async def reap(self) -> None:
        await kill_process(self._process)


class Pool:
    """The processes of one run, between `open_pool` and its end."""

    def __init__(self, processes: Sequence[_Process]) -> None:
        self._processes = processes
        self.lengths = Lengths()

    async def prepare(self) -> None:
        """Return when every process has prepared its requests."""
        self.lengths = merge_lengths(await asyncio.gather(*(p.ready() for p in self._processes)))

    async def connect(self) -> None:
        """Return when every process has opened its connections."""
        for process in self._processes:
            process.send(Connect())
        await asyncio.gather(*(process.ready() for process in self._processes))

    async def run(
        self,
        stop: asyncio.Event | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Outcome:
        """Begin, and wait until all processes have ended; `stop` ends the run early.

        Raises InterruptedRunError when `stop` comes before the beginning.
        """
        await unless_stopped(self.connect(), stop)
        begin = perf_counter_ns() + _LEAD_NS
        for process in self._processes:
            process.send(Go(begin))
        background = [asyncio.create_task(p.beacons()) for p in self._processes]
        if on_progress is not None:
            background.append(asyncio.create_task(self._report_progress(on_progress)))
        reports = asyncio.gather(*(p.report() for p in self._processes))
        try:
            interrupted = await self._wait(reports, stop)
            return _outcome(reports.result(), interrupted)
        finally:
            reports.cancel()
            for task in background:
                task.cancel()
            await asyncio.gather(*background, reports, return_exceptions=True)
            if on_progress is not None:
                on_progress(self.progress())

    async def _wait(
        self, reports: asyncio.Future[list[Report]], stop: asyncio.Event | None
    ) -> bool:
        """True when `stop` came first."""
        if stop is None:
            await reports
            return False
        stopping = asyncio.create_task(stop.wait())
        waited: list[asyncio.Future[Any]] = [reports, stopping]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        early = not reports.done()
        stopping.cancel()
        if early:
            for process in self._processes:
                process.send(Stop())
        await reports
        return early

    async def _report_progress(self, on_progress: Callable[[Progress], None]) -> None:
        while True:
            await asyncio.sleep(0.5)
            on_progress(self.progress())

    def progress(self) -> Progress:
        """The progress of all processes together."""
        parts = [msgspec.structs.astuple(p.progress) for p in self._processes]
        together = Progress(*(sum(column) for column in zip(*parts, strict=True)))
        seconds = max(p.progress.seconds for p in self._processes)
        return msgspec.structs.replace(together, seconds=seconds)


def _outcome(reports: Sequence[Report], interrupted: bool) -> Outcome:
    parts = [
        ProcessRecords(
            records=unpack(report.batch),
            cpu_s=report.cpu_s,
            wall_s=report.wall_s,
            parse_s=report.parse_s,
            read_ns=_int64(report.read_ns),
            lag_ns=_int64(report.lag_ns),
        )
        for report in reports
    ]
    pooled = [record for part in parts for record in part.records]
    return Outcome(parts, pooled, sum(r.started for r in reports), interrupted)


def _int64(data: bytes) -> array[int]:
    values = array("q")
    values.frombytes(data)
    return values


@asynccontextmanager
async def open_pool(options: BenchOptions, model: str) -> AsyncIterator[Pool]:
    """The load processes of a run, with their assignments; reaped at the end."""
    wanted = _process_count(options)
    limits = split_limit(options.max_concurrency, wanted)
    processes: list[_Process] = []
    try:
        for number in range(wanted):
            started = await asyncio.create_subprocess_exec(
                *COMMAND,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            processes.append(_Process(number, started))
        for number, process in enumerate(processes):
            process.send(Assignment(options, model, number, wanted, limits[number]))
        yield Pool(processes)
    finally:
        await asyncio.gather(*(process.reap() for process in processes))


def _process_count(options: BenchOptions) -> int:
    """The number of processes: as asked for, but none without a request or a slot of its own."""
    most = [options.processes]
    most += [n for n in (options.max_concurrency, options.workload.count) if n is not None]
    return max(1, min(most))
