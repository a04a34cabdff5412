"""A load process: takes its share of a run over stdin, sends it, reports over stdout.

It does nothing else, so that its clock is read when a chunk comes. The garbage collector stands
still, the terminal's interrupt is left to the parent, and when the parent is gone it ends.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
from array import array
from collections.abc import Iterator
from itertools import islice
from time import perf_counter_ns

import uvloop

from millrace.bench.load.arrivals import due_times
from millrace.bench.load.driver import Job, Load
from millrace.bench.load.jobs import indices, make_job
from millrace.bench.load.messages import (
    FROM_WORKER,
    TO_WORKER,
    Assignment,
    Beacon,
    Connect,
    Fault,
    FromWorker,
    Go,
    Progress,
    Ready,
    Report,
)
from millrace.bench.load.records import RequestTiming, pack
from millrace.bench.workload.prompts import Prompt, lengths, maker
from millrace.common.open_files import raise_file_limit
from millrace.errors import UserError

_PREPARED = 20_000  # requests made before the run begins; more are made as it goes
_SAMPLED = 256  # prompts whose lengths are told where a workload has no end
_TELL_S = 0.5
_OPENED = 32  # connections opened beforehand where there is no limit


class _Orders(asyncio.Protocol):
    """What the parent says; the time is read before the bytes are looked at."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.assignment: asyncio.Future[Assignment] = loop.create_future()
        self.begin: asyncio.Future[int] = loop.create_future()
        self.connect = asyncio.Event()
        self.stop = asyncio.Event()
        self.forget()
        self._received = bytearray()

    def forget(self) -> None:
        """Drop the beacons so far."""
        self.read_ns, self.lag_ns = array("q"), array("q")

    def data_received(self, data: bytes) -> None:
        now = perf_counter_ns()
        self._received += data
        for message in TO_WORKER.take(self._received):
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
        os._exit(1)  # the parent is gone: nobody wants the rest


class Share:
    """This process' part of the workload: prompts known beforehand, jobs, due times."""

    def __init__(self, assignment: Assignment) -> None:
        self._options, self._model = assignment.options, assignment.model
        self._part = (assignment.process, assignment.processes)
        self.connections = min(assignment.limit or _OPENED, self._own_count())
        self._make = maker(self._options.workload, as_text=self._options.as_text)
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
        numbers = list(islice(self._numbers(), _PREPARED if counted else _SAMPLED))
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


class _Tally:
    """Counts for the progress line, kept as records come."""

    def __init__(self) -> None:
        self.done = self.failed = self.tokens = self.timed = 0
        self.ttft_sum = 0.0

    def take(self, record: RequestTiming) -> None:
        self.done += 1
        self.tokens += record.output_tokens
        if record.error is not None:
            self.failed += 1
        elif record.chunk_ns:
            self.timed += 1
            self.ttft_sum += record.ttft


def _load(assignment: Assignment, share: Share, tally: _Tally) -> Load:
    options = assignment.options
    return Load(
        options.target,
        share.jobs(),
        share.due(),
        limit=assignment.limit,
        timeout=options.timeout,
        until=options.duration,
        on_record=tally.take,
    )


async def _serve(out: int) -> None:
    loop = asyncio.get_running_loop()
    _, orders = await loop.connect_read_pipe(_Orders, os.fdopen(0, "rb", buffering=0))
    assignment = await orders.assignment
    share = Share(assignment)
    tally = _Tally()
    load = _load(assignment, share, tally)
    _tell(out, Ready(share.lengths))
    await orders.connect.wait()
    await load.open(share.connections)
    _tell(out, Ready(share.lengths))
    begin_ns = await orders.begin
    load.begin_at(begin_ns)
    gc.collect()
    gc.freeze()
    gc.disable()
    await asyncio.sleep(max(0.0, (begin_ns - perf_counter_ns()) / 1e9))
    orders.forget()  # those from before the run are no part of it
    cpu, wall = time.process_time(), time.perf_counter()
    await _until_done(load, orders.stop, out, tally)
    _tell(
        out,
        Report(
            batch=pack(load.records),
            cpu_s=time.process_time() - cpu,
            wall_s=time.perf_counter() - wall,
            parse_s=load.parse_ns / 1e9,
            read_ns=orders.read_ns.tobytes(),
            lag_ns=orders.lag_ns.tobytes(),
            started=load.started,
        ),
    )


async def _until_done(load: Load, stop: asyncio.Event, out: int, tally: _Tally) -> None:
    """Run the load to its end or to the order to stop, telling how far it is."""
    running = asyncio.create_task(load.run())
    stopping = asyncio.create_task(stop.wait())
    while not running.done():
        await asyncio.wait(
            [running, stopping] if not stop.is_set() else [running],
            timeout=_TELL_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if stop.is_set():
            load.stop()
        counted = (tally.done, tally.failed, load.in_flight, tally.tokens, tally.timed)
        _tell(out, Progress(load.started, *counted, tally.ttft_sum))
    stopping.cancel()
    running.result()


def _tell(out: int, message: FromWorker) -> None:
    data = memoryview(FROM_WORKER.encode(message))
    while data:
        data = data[os.write(out, data) :]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise_file_limit()
    out = os.dup(1)
    os.dup2(2, 1)  # what anybody prints must not fall between the frames
    try:
        uvloop.run(_serve(out))
    except UserError as error:
        _tell(out, Fault(str(error), refused=True))
    except Exception as error:
        _tell(out, Fault(f"{type(error).__name__}: {error}", refused=False))
        raise
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
