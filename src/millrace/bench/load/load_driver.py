"""The load driver: sends prepared requests when they are due and records the answers.

Closed loop (a limit on requests in flight), open loop (arrival times), or both; for a number of
requests or for a time. Connections are kept alive and reused. This module knows bytes and times.
What is sent, and what the figures mean, is for other modules.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter_ns, thread_time_ns

import msgspec

from millrace.bench.load.answer_reader import Answer, read_answer
from millrace.bench.load.records import RequestTiming
from millrace.bench.load.timed_connection import RawResponse, TimedConnection, connect
from millrace.common.http_client import Response, Target

_SENT_AT_ONCE = 4  # requests sent before the loop serves its sockets again
_OPENED_AT_ONCE = 64  # connections opened at once


class Job(msgspec.Struct, frozen=True):
    """One request, ready to be written: its bytes, and the number of tokens of its prompt.

    index: its number in the whole workload; -1 lets the driver count. turn: its number in its
    conversation. then: makes the request of the next turn from the text of this answer; it returns
    None at the end of the conversation. pause: seconds to wait before it is sent. kind, base,
    fresh: as in its record.
    """

    request: bytes
    input_tokens: int
    index: int = -1
    turn: int = 0
    then: Callable[[str], Job | None] | None = None
    pause: float = 0.0
    kind: int = 0
    base: int = -1
    fresh: int = 1000


class _Answered(msgspec.Struct, frozen=True):
    """A request with its answer, which is not parsed yet."""

    index: int
    job: Job
    scheduled_ns: int
    start_ns: int
    connect_ns: int
    raw: RawResponse


class _Server:
    """A server and the connections to it. in_flight: requests that it has not answered."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.in_flight = 0
        self._idle: list[TimedConnection] = []
        self._busy: set[TimedConnection] = set()

    async def open(self, count: int) -> bool:
        """Open connections; False where one cannot be opened."""
        opened = await asyncio.gather(
            *(connect(self.target) for _ in range(count)), return_exceptions=True
        )
        good = [one for one in opened if isinstance(one, TimedConnection)]
        self._idle += good
        return len(good) == count

    @property
    def pieces_arriving(self) -> int:
        """Pieces that have arrived of the answers that are not whole."""
        return sum(connection.pieces for connection in self._busy)

    async def connect(self) -> TimedConnection:
        """A new connection, for a request. Raises OSError."""
        return self._taken(await connect(self.target))

    def _taken(self, connection: TimedConnection) -> TimedConnection:
        self._busy.add(connection)  # until it is released
        return connection

    def take_idle(self) -> TimedConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return self._taken(connection)
        return None

    def release(self, connection: TimedConnection | None) -> None:
        if connection is None:
            return
        self._busy.discard(connection)
        if connection.busy:
            connection.close()
        elif connection.open:
            self._idle.append(connection)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


class Load:
    """One run against one server, or several.

    targets: each request goes to the one that has the fewest of this load's, the first of equals.
    arrivals: seconds after the start at which each job is due (ascending); None for a job that is
    due when a slot is free. Jobs and arrivals are paired until either ends. limit: the most
    conversations in flight, None for no limit. timeout: seconds that one request may take. until:
    seconds after which no more are sent; those in flight are awaited. on_record is called with the
    record of each request when it ends.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        jobs: Iterable[Job],
        arrivals: Iterable[float | None],
        *,
        limit: int | None = None,
        timeout: float = 600.0,
        until: float | None = None,
        on_record: Callable[[RequestTiming], None] | None = None,
    ) -> None:
        self._servers = [_Server(target) for target in targets]
        self._jobs = jobs
        self._arrivals = arrivals
        self._slots = asyncio.Semaphore(limit) if limit else None
        self._timeout = timeout
        self._until = until
        self._begin_ns = 0
        self._on_record = on_record
        self._requests: set[asyncio.Task[None]] = set()
        self._dispatcher: asyncio.Task[None] | None = None
        self._fault: BaseException | None = None
        self._unparsed: deque[_Answered] = deque()
        self.records: list[RequestTiming] = []
        self.started = 0
        self.parse_ns = 0

    @property
    def in_flight(self) -> int:
        """Requests (or conversations) that are not answered yet."""
        return len(self._requests)

    @property
    def pieces_in_flight(self) -> int:
        """Pieces of answers that have arrived, of answers that are not parsed yet."""
        arriving = sum(server.pieces_arriving for server in self._servers)
        return arriving + sum(len(sent.raw.pieces) for sent in self._unparsed)

    def begin_at(self, begin_ns: int) -> None:
        """Count time from that moment, and not from the call of `run`."""
        self._begin_ns = begin_ns

    async def open(self, count: int) -> None:
        """Open connections before the run, so that the run does not begin with connecting. A
        connection that cannot be opened is left to the request that will need it."""
        each = -(-count // len(self._servers))
        for server in self._servers:
            for first in range(0, each, _OPENED_AT_ONCE):
                if not await server.open(min(_OPENED_AT_ONCE, each - first)):
                    break

    async def run(self) -> list[RequestTiming]:
        """Send every job and return the records, in the order in which requests ended."""
        self._dispatcher = asyncio.create_task(self._dispatch())
        try:
            await asyncio.wait([self._dispatcher])
            if not self._dispatcher.cancelled():
                self._dispatcher.result()
            while self._requests:
                await asyncio.wait(self._requests)
        finally:
            for server in self._servers:
                server.close()
        while self._unparsed:
            self._parse_one()
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
        began = self._begin_ns or perf_counter_ns()
        last = None if self._until is None else began + round(self._until * 1e9)
        for index, (job, due) in enumerate(zip(self._jobs, self._arrivals, strict=False)):
            scheduled = began + round((due or 0.0) * 1e9)
            if (wait := scheduled - perf_counter_ns()) > 0:
                await asyncio.sleep(wait / 1e9)
            elif index % _SENT_AT_ONCE == 0:
                await asyncio.sleep(0)  # chunks of those already sent must not wait for the rest
            if self._slots is not None and not await self._slot(last):
                return
            if last is not None and perf_counter_ns() >= last:
                return
            number = index if job.index < 0 else job.index
            task = asyncio.create_task(
                self._run_conversation(number, job, 0 if due is None else scheduled)
            )
            self.started += 1
            self._requests.add(task)
            task.add_done_callback(self._ended)

    async def _slot(self, last: int | None) -> bool:
        """Wait for a free slot; False when the time `last` (ns) comes first."""
        assert self._slots is not None
        if last is None:
            return await self._slots.acquire()
        try:
            async with asyncio.timeout(max(0.0, (last - perf_counter_ns()) / 1e9)):
                return await self._slots.acquire()
        except TimeoutError:
            return False

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._requests.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._fault = failure

    async def _run_conversation(self, index: int, job: Job, scheduled_ns: int) -> None:
        """One job and the turns that follow from its answers. Its slot is held throughout."""
        try:
            following: Job | None = job
            while following is not None:
                job = following
                if job.pause:
                    await asyncio.sleep(job.pause)
                sent = await self._request(index, job, scheduled_ns)
                if job.then is None:
                    break
                answer = self._parse(sent)
                # After a failed turn there is no answer to continue from.
                following = None if answer is None or answer.error else job.then(answer.text)
                scheduled_ns = 0
        finally:
            # The next request leaves before this one is parsed.
            if self._slots is not None:
                self._slots.release()
        if job.then is None:
            self._unparsed.append(sent)
            if len(self._unparsed) == 1:
                asyncio.get_running_loop().call_soon(self._parse_next)

    async def _request(self, index: int, job: Job, scheduled_ns: int) -> _Answered:
        server = min(self._servers, key=lambda one: one.in_flight)
        server.in_flight += 1
        begun_ns = start_ns = perf_counter_ns()
        reused = connection = server.take_idle()
        try:
            if connection is None:
                connection = await server.connect()
            # Setting up a connection belongs to the client's own queueing, not to the server.
            start_ns = perf_counter_ns()
            async with asyncio.timeout(self._timeout):
                raw = await connection.send(job.request)
                if reused and raw.error and not raw.begun:
                    # The server closed an idle connection as we wrote to it: HTTP's own race.
                    server.release(connection)
                    connection = await server.connect()
                    raw = await connection.send(job.request)
        except OSError as error:
            raw = self._failed_response(server.target, error)
        finally:
            server.in_flight -= 1
            server.release(connection)
        connect_ns = 0 if reused else start_ns - begun_ns
        return _Answered(index, job, scheduled_ns or start_ns, start_ns, connect_ns, raw)

    def _failed_response(self, target: Target, error: OSError) -> RawResponse:
        raw = RawResponse()
        if isinstance(error, TimeoutError):
            raw.end(f"no complete answer within {self._timeout:g} s")
        else:
            raw.end(f"cannot connect to {target}: {error}")
        return raw

    # --- parsing answers -----------------------------------------------------------------------

    def _parse_next(self) -> None:
        """Parse one answer, then let the loop serve its sockets before the next one."""
        if self._unparsed:
            self._parse_one()
        if self._unparsed:
            asyncio.get_running_loop().call_soon(self._parse_next)

    def _parse_one(self) -> None:
        self._parse(self._unparsed.popleft())

    def _parse(self, sent: _Answered) -> Answer | None:
        """Parse an answer and add its record. None where there was no answer at all."""
        began = thread_time_ns()
        response = sent.raw.response()
        answer = read_answer(response) if response.status else None
        self._add_record(sent, response, answer)
        self.parse_ns += thread_time_ns() - began
        return answer

    def _add_record(self, sent: _Answered, response: Response, answer: Answer | None) -> None:
        chunk_ns = answer.chunk_ns if answer else []
        text_chunks = answer.text_chunks if answer else 0
        prompt_tokens = answer.prompt_tokens if answer else None
        output_tokens = answer.completion_tokens if answer else None
        record = RequestTiming(
            index=sent.index,
            turn=sent.job.turn,
            kind=sent.job.kind,
            base=sent.job.base,
            fresh=sent.job.fresh,
            scheduled_ns=sent.scheduled_ns,
            start_ns=sent.start_ns,
            end_ns=response.end_ns,
            chunk_ns=array("q", chunk_ns),
            input_tokens=sent.job.input_tokens if prompt_tokens is None else prompt_tokens,
            output_tokens=text_chunks if output_tokens is None else output_tokens,
            counted=output_tokens is not None and prompt_tokens is not None,
            cached_tokens=answer.cached_tokens if answer else -1,
            error=answer.error if answer else response.error,
            received_ns=answer.received_ns if answer else 0,
            connect_ns=sent.connect_ns,
            sent_ns=array("q", answer.sent_ns if answer else []),
        )
        self.records.append(record)
        if self._on_record is not None:
            self._on_record(record)
