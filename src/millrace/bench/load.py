"""The driver: sends prepared requests when they are due and keeps what came back of each.

Closed loop (a limit on requests in flight), open loop (arrival times), or both. Connections are
kept alive and reused. It knows bytes and times; what to send and what the figures mean is for
others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from time import perf_counter_ns

import msgspec

from millrace.bench.metrics import Record
from millrace.bench.stream import read_answer
from millrace.http1 import Connection, Response, Target, connect


class Job(msgspec.Struct, frozen=True):
    """One request, ready to be written: its bytes, and the tokens its prompt was made of."""

    request: bytes
    input_tokens: int


class Load:
    """One run against one server.

    arrivals: seconds after the start at which each job is due (ascending). limit: the most
    requests in flight, None for no limit. timeout: seconds that one request may take.
    on_record is called with each request as it ends.
    """

    def __init__(
        self,
        target: Target,
        jobs: Sequence[Job],
        arrivals: Sequence[float],
        *,
        limit: int | None = None,
        timeout: float = 600.0,
        on_record: Callable[[Record], None] | None = None,
    ) -> None:
        self._target = target
        self._jobs = jobs
        self._arrivals = arrivals
        self._slots = asyncio.Semaphore(limit) if limit else None
        self._timeout = timeout
        self._on_record = on_record
        self._idle: list[Connection] = []
        self._requests: set[asyncio.Task[None]] = set()
        self._dispatcher: asyncio.Task[None] | None = None
        self._fault: BaseException | None = None
        self.records: list[Record] = []

    async def run(self) -> list[Record]:
        """Send every job and return the records, in the order in which requests ended."""
        self._dispatcher = asyncio.create_task(self._dispatch())
        try:
            await asyncio.wait([self._dispatcher])
            if not self._dispatcher.cancelled():
                self._dispatcher.result()
            if self._requests:
                await asyncio.wait(self._requests)
        finally:
            for connection in self._idle:
                connection.close()
        if self._fault is not None:
            raise self._fault
        return self.records

    def stop(self) -> None:
        """Send no more and drop what is in flight; dropped requests leave no record."""
        if self._dispatcher is not None:
            self._dispatcher.cancel()
        for request in self._requests:
            request.cancel()

    async def _dispatch(self) -> None:
        began = perf_counter_ns()
        for index, (job, due) in enumerate(zip(self._jobs, self._arrivals, strict=True)):
            scheduled = began + round(due * 1e9)
            await asyncio.sleep(max(0.0, (scheduled - perf_counter_ns()) / 1e9))
            if self._slots is not None:
                await self._slots.acquire()
            task = asyncio.create_task(self._request(index, job, scheduled if due else 0))
            self._requests.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._requests.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._fault = fault

    async def _request(self, index: int, job: Job, scheduled_ns: int) -> None:
        connection: Connection | None = None
        start_ns = perf_counter_ns()
        try:
            reused = connection = self._take_idle()
            if connection is None:
                connection = await connect(self._target)
            # Setting up a connection belongs to the client's own queueing, not to the server.
            start_ns = perf_counter_ns()
            async with asyncio.timeout(self._timeout):
                response = await connection.send(job.request)
                if reused and response.error and not response.status:
                    # The server closed an idle connection as we wrote to it: HTTP's own race.
                    connection = await connect(self._target)
                    response = await connection.send(job.request)
        except OSError as error:
            response = self._failure(error)
        finally:
            # The next request leaves before this one is parsed.
            self._release(connection)
        self._keep(index, job, scheduled_ns or start_ns, start_ns, response)

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        return None

    def _release(self, connection: Connection | None) -> None:
        if connection is not None:
            if connection.busy:
                connection.close()
            elif connection.open:
                self._idle.append(connection)
        if self._slots is not None:
            self._slots.release()

    def _failure(self, error: OSError) -> Response:
        response = Response()
        if isinstance(error, TimeoutError):
            response.error = f"no complete answer within {self._timeout:g} s"
        else:
            response.error = f"cannot connect to {self._target}: {error}"
        response.end_ns = perf_counter_ns()
        return response

    def _keep(
        self, index: int, job: Job, scheduled_ns: int, start_ns: int, response: Response
    ) -> None:
        answer = read_answer(response) if response.status else None
        chunk_ns = answer.chunk_ns if answer else []
        prompt_tokens = answer.prompt_tokens if answer else None
        output_tokens = answer.completion_tokens if answer else None
        record = Record(
            index=index,
            scheduled_ns=scheduled_ns,
            start_ns=start_ns,
            end_ns=response.end_ns,
            chunk_ns=chunk_ns,
            input_tokens=job.input_tokens if prompt_tokens is None else prompt_tokens,
            output_tokens=len(chunk_ns) if output_tokens is None else output_tokens,
            counted=output_tokens is not None,
            error=answer.error if answer else response.error,
        )
        self.records.append(record)
        if self._on_record is not None:
            self._on_record(record)
