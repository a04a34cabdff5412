"""Sends a batch's requests to its endpoints until each has a result.

A request is taken from the journal, or another ledger, sent, and sent again where that can help.
Its place in the number of open requests is free only once its result is committed, so a kill has at
most that many requests sent twice. Nothing grows with the number of requests. How results are kept,
and what endpoints are, is for other modules.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterator, Sequence
from contextlib import suppress
from time import monotonic
from typing import Protocol

from millrace.batch.endpoint import Answer, Endpoint, Verdict
from millrace.batch.input_file import Place
from millrace.batch.journal import Counts, Pending, Result, StopError
from millrace.batch.lines import RequestLine, error_line, read_usage, response_line
from millrace.batch.options import DispatchOptions
from millrace.batch.window import Window
from millrace.common.backoff import BackoffPolicy

_RETRIES = BackoffPolicy(first=0.5, longest=30.0)
_RECORDED_AT_ONCE = 512  # results of one transaction


class Ledger(Protocol):
    """Which requests have no result yet, and what keeps results. counts: how far the batch is."""

    counts: Counts

    def pending(self) -> Iterator[Pending]:
        """Requests without a result, once each."""

    def record(self, results: Sequence[Result], seconds: float) -> None:
        """Keep results for good. seconds: since the last time. Called in another thread."""

    def finish(self) -> None:
        """No more results come."""


class Source(Protocol):
    """What requests are."""

    def request(self, place: Place) -> RequestLine:
        """The request of a place."""


class Observer(Protocol):
    """Is told how a run goes."""

    def progressed(self) -> None:
        """Results have been committed."""

    def set_aside(self, window: Window) -> None:
        """An endpoint has stopped working."""


class _Job:
    """A request between the journal and its result. attempts: failures that may be its own."""

    __slots__ = ("attempts", "last", "pending", "turns")

    def __init__(self, pending: Pending) -> None:
        self.pending = pending
        self.attempts = 0
        self.turns = 0  # how often it waits its turn again, for whatever reason
        self.last: Window | None = None


class Dispatcher:
    """One run of a batch."""

    def __init__(
        self,
        journal: Ledger,
        source: Source,
        endpoints: Sequence[Endpoint],
        options: DispatchOptions,
        observer: Observer,
    ) -> None:
        self.windows = [Window(endpoint, options.max_in_flight) for endpoint in endpoints]
        self._most_open = options.max_in_flight * len(self.windows)
        self._journal = journal
        self._source = source
        self._options = options
        self._observer = observer
        self._pending: Iterator[Pending] = iter(())
        self._exhausted = False
        self._waiting: list[tuple[float, int, _Job]] = []  # (due, order, job), a heap
        self._order = 0
        self._open = 0  # jobs that exist
        self._results: list[Result] = []
        self._changed = asyncio.Event()
        self._recorded = asyncio.Event()  # there are results to record, or no more will come
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping: float | None = None  # when the last open request is given up
        self._failure: BaseException | None = None
        self._worked_at = self._clock_at = monotonic()

    def stop(self) -> None:
        """Send no more requests; those in flight get a while to end. Again: end at once."""
        limit = self._options.drain if self._stopping is None else 0.0
        self._stopping = monotonic() + limit
        self._changed.set()

    async def run(self) -> bool:
        """Run to the end. False if `stop` came first. Raises StopError."""
        self._pending = self._journal.pending()
        recorder = asyncio.create_task(self._record_loop())
        try:
            await self._dispatch()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._closing = True
            self._recorded.set()
            await recorder
        self._raise_failure()
        await asyncio.to_thread(self._journal.finish)
        return self._exhausted and not self._open

    # --- sending ---------------------------------------------------------------------------------

    async def _dispatch(self) -> None:
        while True:
            self._changed.clear()
            self._raise_failure()
            now = monotonic()
            if self._stopping is not None:
                if (not self._tasks and not self._results) or now >= self._stopping:
                    return
            else:
                self._send_what_fits(now)
                if self._exhausted and not self._open:
                    return
                self._check_outage(now)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._pause(now))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _send_what_fits(self, now: float) -> None:
        while (window := self._next_window(now)) is not None:
            job = self._next_job(now)
            if job is None:
                return
            if job.last is window:  # it failed there: another endpoint, if there is one
                others = [w for w in self.windows if w is not window and w.has_room(now)]
                window = min(others, key=_share) if others else window
            window.sent()
            task = asyncio.create_task(self._serve(job, window))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _next_window(self, now: float) -> Window | None:
        """The endpoint with the most room that should get the next request."""
        free = [window for window in self.windows if window.has_room(now)]
        free = [window for window in free if self._ends_in_time(window)]
        return min(free, key=_share) if free else None

    def _ends_in_time(self, window: Window) -> bool:
        """Whether the others would not be done with all that is left before this endpoint had
        answered one more: at the end a slow endpoint would hold everything up."""
        left = self._journal.counts.total - self._journal.counts.done - self._open
        if left >= self._most_open or not window.latency:
            return True
        others = [w for w in self.windows if w is not window and w.works and w.latency]
        rate = sum(w.size / w.latency for w in others)
        return not rate or window.latency <= max(left, 0) / rate + max(w.latency for w in others)

    def _next_job(self, now: float) -> _Job | None:
        if self._waiting and self._waiting[0][0] <= now:
            return heapq.heappop(self._waiting)[2]
        if self._exhausted or self._open >= self._most_open:
            return None
        pending = next(self._pending, None)
        if pending is None:
            self._exhausted = True
            return None
        self._open += 1
        return _Job(pending)

    def _pause(self, now: float) -> float:
        """Seconds until time alone changes something."""
        moments = [window.opens_at for window in self.windows]
        moments += [self._waiting[0][0]] if self._waiting else []
        moments += [self._stopping] if self._stopping is not None else []
        ahead = [moment - now for moment in moments if moment > now]
        return min([1.0, *ahead]) + 0.001

    def _check_outage(self, now: float) -> None:
        """Raise StopError when no endpoint has worked for long, or none ever will."""
        if any(window.works for window in self.windows):
            self._worked_at = now
            return
        shut = all(window.shut and not window.in_flight for window in self.windows)
        if shut or now - self._worked_at > self._options.give_up_after:
            reasons = "; ".join(f"{w.endpoint.name}: {w.problem}" for w in self.windows)
            since = "" if shut else f" for {self._options.give_up_after:g} s"
            raise StopError(
                f"stopped, because no endpoint works{since}: {reasons}. What is done is kept; run "
                "the same command again to go on"
            )

    # --- one request -----------------------------------------------------------------------------

    async def _serve(self, job: _Job, window: Window) -> None:
        request = self._source.request(job.pending.place)
        began = monotonic()
        answer = await window.endpoint.send(
            request.url,
            request.encoded_body(),
            job.pending.key,
            self._options.request_timeout,
        )
        now = monotonic()
        if window.answered(answer, began, now):
            self._observer.set_aside(window)
        job.last = window
        result = self._result(job, answer)
        if result is not None:
            self._results.append(result)
            self._recorded.set()
        else:
            self._send_again(job, answer, now)
        self._changed.set()

    def _result(self, job: _Job, answer: Answer) -> Result | None:
        """What becomes of the request; None: it is sent again."""
        number, custom_id, verdict = job.pending.place.number, job.pending.custom_id, answer.verdict
        if verdict is Verdict.FAILED:
            job.attempts += 1
            if job.attempts > self._options.max_retries:
                reason = f"{answer.reason} ({job.attempts} attempts)"
                if not answer.status:
                    return Result(number, error_line(custom_id, "no_answer", reason), True)
                return self._answered(number, custom_id, answer, True)
            return None
        if verdict is Verdict.SHUT and job.last is not None and job.last.finished:
            verdict = Verdict.REFUSED  # others were served there
        if verdict in (Verdict.KEEP, Verdict.REFUSED):
            return self._answered(number, custom_id, answer, verdict is Verdict.REFUSED)
        return None

    def _answered(self, number: int, custom_id: str, answer: Answer, failed: bool) -> Result:
        line = response_line(custom_id, answer.status, answer.request_id, answer.body)
        usage = None if failed else read_usage(answer.body)
        return Result(number, line, failed) if usage is None else Result(number, line, False, usage)

    def _send_again(self, job: _Job, answer: Answer, now: float) -> None:
        job.turns += 1
        pause = 0.0 if answer.verdict in (Verdict.BUSY, Verdict.SHUT) else _RETRIES.pause(job.turns)
        self._order += 1
        heapq.heappush(self._waiting, (now + pause, self._order, job))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error
        self._changed.set()

    # --- results ---------------------------------------------------------------------------------

    async def _record_loop(self) -> None:
        try:
            while self._results or not self._closing:
                await self._recorded.wait()
                self._recorded.clear()
                while self._results:
                    await self._record()
        except Exception as error:
            self._failure = error
        finally:
            self._changed.set()

    async def _record(self) -> None:
        """Commit results. Their places are free afterwards."""
        batch, self._results = (
            self._results[:_RECORDED_AT_ONCE],
            self._results[_RECORDED_AT_ONCE:],
        )
        now = monotonic()
        spent, self._clock_at = now - self._clock_at, now
        await asyncio.to_thread(self._journal.record, batch, spent)
        self._open -= len(batch)
        self._observer.progressed()
        self._changed.set()


def _share(window: Window) -> float:
    return window.in_flight / window.size
