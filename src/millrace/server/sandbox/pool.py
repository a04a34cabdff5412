"""A pool of sandbox processes: started before they are needed, replaced when one dies.

Each process does one job at a time within a time and a memory limit. The number of jobs that wait
is limited, and so is the time that one waits. What the jobs mean is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import OrderedDict, deque

import msgspec

from millrace.common.backoff import Backoff, BackoffPolicy
from millrace.common.child_process import kill_process, python_module
from millrace.common.framing import FramingError
from millrace.server.sandbox.jobs import Answer, Job, Ready, answer_framing, job_framing

logger = logging.getLogger(__name__)

START_SECONDS = 60.0  # for a process to load, on a busy machine
WAIT_SECONDS = 60.0  # for a job to get a process
CACHED_ANSWERS = 64
CACHED_BYTES = 1 << 18  # a larger job is not cached
_RESTARTS = BackoffPolicy(first=0.01, longest=5.0, settled=10.0)
_Waiting = tuple[bytes, asyncio.Future[Answer]]


class SandboxFailedError(Exception):
    """The process died over a job, or the job took too long; the message says which."""


class SandboxBusyError(Exception):
    """Too many jobs wait, or no process could be started for this one in time."""


class SandboxOptions(msgspec.Struct, frozen=True, kw_only=True):
    """name: of the jobs, for the log. processes: how many run. max_queue: jobs that may wait.

    job_seconds: after that long a job's process is killed. memory_bytes: of address space in each
    process. arguments: more of them for `millrace.server.sandbox.child`.
    """

    name: str
    processes: int
    max_queue: int
    job_seconds: float
    memory_bytes: int
    arguments: tuple[str, ...] = ()


class Sandbox:
    """Runs jobs in processes of its own. Used within one event loop; `close` ends the processes."""

    def __init__(self, options: SandboxOptions) -> None:
        self._options = options
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(options.max_queue)
        self._returned: deque[_Waiting] = deque()  # jobs that no process has seen
        self._workers: list[asyncio.Task[None]] = []
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()

    def start(self) -> None:
        """Start the processes; they load while this returns. Starting again does nothing."""
        if not self._workers:
            loop = asyncio.get_running_loop()
            self._workers = [loop.create_task(self._work()) for _ in range(self._options.processes)]

    async def run(self, job: Job) -> Answer:
        """The answer to a job. Raises SandboxFailedError or SandboxBusyError."""
        data = job_framing.encode(job)
        if (known := self._answers.get(data)) is not None:
            self._answers.move_to_end(data)
            return known
        self.start()
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait((data, future))
            async with asyncio.timeout(WAIT_SECONDS + self._options.job_seconds):
                answer = await future
        except asyncio.QueueFull:
            message = f"{self._queue.qsize()} {self._options.name} wait, as many as may"
            raise SandboxBusyError(message) from None
        except TimeoutError:
            raise SandboxBusyError(f"no process took the {self._options.name} in time") from None
        if len(data) <= CACHED_BYTES:
            self._answers[data] = answer
            if len(self._answers) > CACHED_ANSWERS:
                self._answers.popitem(last=False)
        return answer

    async def close(self) -> None:
        """End the processes; jobs that wait never get an answer."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        self._workers = []

    async def _work(self) -> None:
        """One process after another, each until it dies."""
        backoff = Backoff(_RESTARTS)
        while True:
            loop = asyncio.get_running_loop()
            began = loop.time()
            try:
                process = await self._start_process()
                try:
                    async with asyncio.timeout(START_SECONDS):
                        await _receive_ready(process)
                    backoff.reset()
                    await self._serve(process)
                finally:
                    await kill_process(process)
            except (OSError, TimeoutError, SandboxFailedError) as error:
                logger.warning("a process for %s: %s", self._options.name, error)
            await asyncio.sleep(backoff.failed(loop.time() - began))

    async def _start_process(self) -> asyncio.subprocess.Process:
        options = self._options
        return await asyncio.create_subprocess_exec(
            *python_module(
                "millrace.server.sandbox.child",
                *("--parent-pid", str(os.getpid())),
                *("--memory-bytes", str(options.memory_bytes)),
                *options.arguments,
            ),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )

    async def _serve(self, process: asyncio.subprocess.Process) -> None:
        """Jobs one by one. Raises SandboxFailedError when the process has died over one."""
        while True:
            data, future = await self._next_job(process)
            if future.done():  # its client has gone
                continue
            try:
                async with asyncio.timeout(self._options.job_seconds):
                    answer = await _exchange(process, data)
            except TimeoutError:
                error = SandboxFailedError(f"a job took over {self._options.job_seconds:g} s")
            except (OSError, asyncio.IncompleteReadError, FramingError):
                error = SandboxFailedError(f"it died over a job ({await _status(process)})")
            except asyncio.CancelledError:
                future.cancel()
                raise
            else:
                if not future.done():
                    future.set_result(answer)
                continue
            if not future.done():
                future.set_exception(error)
            raise error

    async def _next_job(self, process: asyncio.subprocess.Process) -> _Waiting:
        """The next job. Raises SandboxFailedError if the process has ended while it was idle; a job
        that came at the same time is left to the next process."""
        if self._returned:
            if not _has_ended(process):
                return self._returned.popleft()
            raise SandboxFailedError(f"it ended while idle ({await _status(process)})")
        job = asyncio.ensure_future(self._queue.get())
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait((job, ended), return_when=asyncio.FIRST_COMPLETED)
            if not _has_ended(process):
                return job.result()
            if job.done():
                self._returned.append(job.result())
            raise SandboxFailedError(f"it ended while idle ({await _status(process)})")
        finally:
            job.cancel()
            ended.cancel()


def _has_ended(process: asyncio.subprocess.Process) -> bool:
    """Whether a process has ended, also where the event loop has not yet been told."""
    if process.returncode is not None:
        return True
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


async def _exchange(process: asyncio.subprocess.Process, data: bytes) -> Answer:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(data)
    with contextlib.suppress(ConnectionError):  # reading says how it ended
        await process.stdin.drain()
    return await answer_framing.receive(process.stdout)


async def _receive_ready(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    try:
        answer = await answer_framing.receive(process.stdout)
    except (asyncio.IncompleteReadError, FramingError):
        raise SandboxFailedError(f"it did not start ({await _status(process)})") from None
    if not isinstance(answer, Ready):
        raise SandboxFailedError("it did not say that it is ready")


async def _status(process: asyncio.subprocess.Process) -> str:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), 1.0)
    status = process.returncode
    if status is None:
        return "it still runs"
    return f"signal {-status}" if status < 0 else f"status {status}"
