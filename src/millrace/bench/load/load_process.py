"""A load process: gets its share of a run over stdin, sends the requests, reports over stdout.

It does nothing else, so that it reads its clock as soon as a chunk arrives. The garbage collector
is off, the parent alone handles the terminal's interrupt, and the process ends with its parent.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from itertools import islice
from time import perf_counter_ns

import uvloop

from millrace.bench.load.arrivals import due_times
from millrace.bench.load.load_driver import Job, Load
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
)
from millrace.bench.load.records import RequestTiming, pack
from millrace.bench.load.request_builder import indices, make_job
from millrace.bench.workload.prompts import Prompt, lengths, prompt_maker
from millrace.common.open_files import raise_file_limit
from millrace.errors import UserError

_PREPARED_REQUESTS = 20_000  # requests made before the run begins; more are made during it
_SAMPLED_PROMPTS = 256  # prompts whose lengths are reported for a workload without end
_PROGRESS_S = 0.5
_OPEN_CONNECTIONS = 32  # connections opened before the run where there is no limit


class _ControlChannel(asyncio.Protocol):
    """The messages of the parent. The clock is read before they are decoded."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.assignment: asyncio.Future[Assignment] = loop.create_future()
        self.begin: asyncio.Future[int] = loop.create_future()
        self.connect = asyncio.Event()
        self.stop = asyncio.Event()
        self.drop_beacons()
        self._received = bytearray()

    def drop_beacons(self) -> None:
        """Drop the beacons that were read so far."""
        self.read_ns, self.lag_ns = array("q"), array("q")

    def data_received(self, data: bytes) -> None:
        now = perf_counter_ns()
        self._received += data
        for message in TO_PROCESS.take(self._received):
            if isinstance(message, Beacon):
                self.read_ns.append(now)
                self.lag_ns.append(now - message.at_ns)
            elif isinstance(message, Go):
                self.begin.set_result(message.begin_ns)
            elif isinstance(message, Assignment):
                self.assignment.set_result(message)
            elif isinstance(message, Connect):
                self.connect.set()
            else:
                self.stop.set()

    def connection_lost(self, exc: Exception | None) -> None:
        os._exit(1)  # the parent has ended


class WorkloadShare:
    """This process' part of the workload: its jobs and when they are due."""

    def __init__(self, assignment: Assignment) -> None:
        self._options, self._model = assignment.options, assignment.model
        self._part = (assignment.process, assignment.processes)
        self.connections = min(assignment.limit or _OPEN_CONNECTIONS, self._own_count())
        self._make = prompt_maker(self._options.workload, as_text=self._options.as_text)
        self._known: dict[int, Prompt] = {}
        self._jobs: dict[int, Job] = {}
        self._prepare()

    def _own_count(self) -> int:
        count, (process, processes) = self._options.workload.count, self._part
        return sys.maxsize if count is None else len(range(process, count, processes))

    def _numbers(self) -> Iterator[int]:
        return indices(self._options.workload.count, *self._part)

    def _prepare(self) -> None:
        counted = self._options.workload.count is not None
        numbers = list(islice(self._numbers(), _PREPARED_REQUESTS if counted else _SAMPLED_PROMPTS))
        self._known = {number: self._make(number) for number in numbers}
        self.lengths = lengths(list(self._known.values()))
        self._jobs = {n: make_job(self._options, self._model, p, n) for n, p in self._known.items()}
        self._known = {}

    def jobs(self) -> Iterator[Job]:
        for number in self._numbers():
            job = self._jobs.pop(number, None)
            yield job or make_job(self._options, self._model, self._make(number), number)

    def due(self) -> Iterator[float | None]:
        process, processes = self._part
        return islice(due_times(self._options.schedule), process, None, processes)


class _ProgressCounter:
    """Counts for the progress line, updated with every record."""

    def __init__(self) -> None:
        self.done = self.failed = self.timed = self._tokens = self._chunks = 0
        self.ttft_sum = 0.0

    def take(self, record: RequestTiming) -> None:
        self.done += 1
        self._tokens += record.output_tokens
        self._chunks += len(record.chunk_ns)
        if record.error is not None:
            self.failed += 1
        elif record.chunk_ns:
            self.timed += 1
            self.ttft_sum += record.ttft

    def progress(self, load: Load, begin_ns: int) -> Progress:
        """What a load has done since its beginning. Answers are parsed only after their ends, so
        one that still arrives counts by its pieces, at the tokens a chunk of those that ended."""
        per_chunk = self._tokens / self._chunks if self._chunks else 1.0
        return Progress(
            started=load.started,
            done=self.done,
            failed=self.failed,
            in_flight=load.in_flight,
            tokens=self._tokens + per_chunk * load.pieces_in_flight,
            timed=self.timed,
            ttft_sum=self.ttft_sum,
            seconds=max(0.0, (perf_counter_ns() - begin_ns) / 1e9),
        )


def _load(assignment: Assignment, share: WorkloadShare, counter: _ProgressCounter) -> Load:
    options = assignment.options
    return Load(
        options.targets,
        share.jobs(),
        share.due(),
        limit=assignment.limit,
        timeout=options.timeout,
        until=options.duration,
        on_record=counter.take,
    )


async def _serve(out: int) -> None:
    loop = asyncio.get_running_loop()
    _, control = await loop.connect_read_pipe(_ControlChannel, os.fdopen(0, "rb", buffering=0))
    assignment = await control.assignment
    share = WorkloadShare(assignment)
    counter = _ProgressCounter()
    load = _load(assignment, share, counter)
    _send(out, Ready(share.lengths))
    await control.connect.wait()
    await load.open(share.connections)
    _send(out, Ready(share.lengths))
    begin_ns = await control.begin
    load.begin_at(begin_ns)
    gc.collect()
    gc.freeze()
    gc.disable()
    await asyncio.sleep(max(0.0, (begin_ns - perf_counter_ns()) / 1e9))
    control.drop_beacons()  # those from before the run do not count
    cpu, wall = time.process_time(), time.perf_counter()
    await _until_done(load, control.stop, out, lambda: counter.progress(load, begin_ns))
    _send(
        out,
        Report(
            batch=pack(load.records),
            cpu_s=time.process_time() - cpu,
            wall_s=time.perf_counter() - wall,
            parse_s=load.parse_ns / 1e9,
            read_ns=control.read_ns.tobytes(),
            lag_ns=control.lag_ns.tobytes(),
            started=load.started,
        ),
    )


async def _until_done(
    load: Load, stop: asyncio.Event, out: int, progress: Callable[[], Progress]
) -> None:
    """Run the load to its end, or until Stop; the progress is reported meanwhile."""
    running = asyncio.create_task(load.run())
    stopping = asyncio.create_task(stop.wait())
    while not running.done():
        await asyncio.wait(
            [running, stopping] if not stop.is_set() else [running],
            timeout=_PROGRESS_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if stop.is_set():
            load.stop()
        _send(out, progress())
    stopping.cancel()
    running.result()


def _send(out: int, message: FromProcess) -> None:
    data = memoryview(FROM_PROCESS.encode(message))
    while data:
        data = data[os.write(out, data) :]


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent decides what is kept
    raise_file_limit()
    out = os.dup(1)
    os.dup2(2, 1)  # printed text must not get between the frames
    try:
        uvloop.run(_serve(out))
    except UserError as error:
        _send(out, Failure(str(error), refused=True))
    except Exception as error:
        _send(out, Failure(f"{type(error).__name__}: {error}", refused=False))
        raise
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
