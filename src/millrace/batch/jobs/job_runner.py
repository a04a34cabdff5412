"""Runs the batches of a catalog, each from its journal, until they end.

A batch's requests go to one server: the one that answers the API. After a restart a batch goes on
from its journal. Every step can be done twice, so that a kill anywhere is harmless. What a request
means is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from millrace.batch.dispatcher import Dispatcher
from millrace.batch.endpoint import Endpoint
from millrace.batch.input_file import InputFile
from millrace.batch.jobs.catalog import Catalog
from millrace.batch.jobs.objects import (
    MAX_REQUESTS,
    BatchObject,
    LineProblem,
    Problems,
)
from millrace.batch.journal import InputError, Journal
from millrace.batch.options import DispatchOptions
from millrace.batch.window import Window
from millrace.errors import one_line

JOBS = 4  # batches that run at a time
POLL_SECONDS = 0.5
PAUSE_SECONDS = 10.0  # before a batch is tried again that could not go on
CANCEL_SECONDS = 10.0  # for requests in flight of a cancelled batch
_CHORES_SECONDS = 60.0


class JobRunner:
    """Runs batches. endpoint: makes the connections of one batch. most_in_flight: its requests."""

    def __init__(
        self,
        catalog: Catalog,
        endpoint: Callable[[], Endpoint],
        most_in_flight: int,
        log: Callable[[str], None],
    ) -> None:
        self._catalog = catalog
        self._endpoint = endpoint
        self._options = DispatchOptions(max_in_flight=most_in_flight, drain=CANCEL_SECONDS)
        self._log = log
        self._running: dict[str, asyncio.Task[None]] = {}
        self._paused: dict[str, float] = {}  # batches that could not go on -> when they may again

    async def run(self) -> None:
        """Run whatever there is, for ever."""
        chores = 0.0
        while True:
            now = time.monotonic()
            if now >= chores:
                chores = now + _CHORES_SECONDS
                await asyncio.to_thread(self._catalog.remove_expired, time.time())
            for batch, owner in await asyncio.to_thread(self._catalog.open_batches):
                free = len(self._running) < JOBS and self._paused.get(batch.id, 0.0) <= now
                if free and batch.id not in self._running:
                    task = asyncio.create_task(self._run_job(batch, owner))
                    self._running[batch.id] = task
                    task.add_done_callback(lambda _, id=batch.id: self._running.pop(id))  # type: ignore[misc]
            await asyncio.sleep(POLL_SECONDS)

    async def _run_job(self, batch: BatchObject, owner: str) -> None:
        try:
            await _Job(self._catalog, batch, owner, self._endpoint(), self._options).run()
            self._paused.pop(batch.id, None)
        except Exception as error:  # whatever it is, the batch goes on later
            self._paused[batch.id] = time.monotonic() + PAUSE_SECONDS
            self._log(f"{batch.id} goes on in {PAUSE_SECONDS:g} s: {one_line(error)}")


class _Job:
    """One batch. It is also the observer of its dispatcher."""

    def __init__(
        self,
        catalog: Catalog,
        batch: BatchObject,
        owner: str,
        endpoint: Endpoint,
        options: DispatchOptions,
    ) -> None:
        self._catalog = catalog
        self._batch = batch
        self._owner = owner
        self._endpoint = endpoint
        self._options = options
        self._folder = catalog.job(batch.id)
        self._output = self._folder / "output.jsonl"
        self._errors = self._folder / "errors.jsonl"

    async def run(self) -> None:
        """Bring it to its end, from wherever it is. Raises StopError, OSError, UserError."""
        batch = self._batch
        if batch.status == "finalizing" or not self._input.exists():
            if batch.status != "finalizing":
                problem = LineProblem("input_file_deleted", "the input file is gone")
                self._fail([problem])
            else:
                self._finalize()
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with closing(InputFile(self._input, url=batch.endpoint)) as source:
            try:
                journal = await asyncio.to_thread(self._load, source)
            except InputError as error:
                self._fail([_problem(text) for text in error.problems] or [_problem(str(error))])
                return
            with closing(journal):
                if journal.counts.total > MAX_REQUESTS:
                    message = f"the file has {journal.counts.total} requests; {MAX_REQUESTS} work"
                    self._fail([LineProblem("too_many_requests", message)])
                    return
                ending = await self._answer_all(source, journal)
                if ending is not None:
                    await asyncio.to_thread(journal.abandon, f"batch_{ending}", _WHY[ending])
                self._begin_to_finalize(journal, ending)
        self._finalize()

    @property
    def _input(self) -> Path:
        return self._catalog.content(self._batch.input_file_id)

    def _load(self, source: InputFile) -> Journal:
        journal = Journal(self._output, self._errors)
        try:
            journal.load(source)
        except BaseException:
            journal.close()
            raise
        return journal

    async def _answer_all(self, source: InputFile, journal: Journal) -> str | None:
        """Send what is left. None: all is done; else why it ended before."""
        self._note_progress(journal)
        observer = _Observer()
        dispatcher = Dispatcher(journal, source, [self._endpoint], self._options, observer)
        running = asyncio.create_task(dispatcher.run())
        ending: str | None = None
        try:
            while not running.done():
                batch = self._note_progress(journal)
                found = _ending_of(batch)
                if found is not None and ending is None:
                    ending = found
                    dispatcher.stop()
                await asyncio.wait([running], timeout=POLL_SECONDS)
            whole = running.result()
        finally:
            running.cancel()
            with contextlib.suppress(BaseException):
                await running
            await self._endpoint.close()
        return None if whole else ending

    def _note_progress(self, journal: Journal) -> BatchObject:
        def change(batch: BatchObject) -> None:
            if batch.status == "validating":
                batch.status, batch.in_progress_at = "in_progress", int(time.time())
            batch.count(journal.counts)

        return self._catalog.change(self._batch.id, change)

    def _begin_to_finalize(self, journal: Journal, ending: str | None) -> None:
        counts, now = journal.counts, int(time.time())

        def change(batch: BatchObject) -> None:
            batch.count(counts)
            batch.status, batch.finalizing_at = "finalizing", now
            if counts.done > counts.failed:
                batch.output_file_id = f"file-{uuid.uuid4().hex}"
            if counts.failed:
                batch.error_file_id = f"file-{uuid.uuid4().hex}"
            if ending == "expired":
                batch.expired_at = now
            elif ending == "cancelled":
                batch.cancelled_at = now

        self._batch = self._catalog.change(self._batch.id, change)

    def _finalize(self) -> None:
        """Make files of the results, and end the batch. It may have been done in part already."""
        batch, keep = self._batch, self._catalog.keep(self._batch.id)
        for file_id, path, name in (
            (batch.output_file_id, self._output, "output"),
            (batch.error_file_id, self._errors, "error"),
        ):
            if file_id is not None and path.exists():
                self._catalog.add_file(
                    path, self._owner, f"{batch.id}_{name}.jsonl", "batch_output", keep, file_id
                )

        def change(batch: BatchObject) -> None:
            if batch.cancelled_at is not None:
                batch.status = "cancelled"
            elif batch.expired_at is not None:
                batch.status = "expired"
            else:
                batch.status, batch.completed_at = "completed", int(time.time())

        self._catalog.change(batch.id, change)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _fail(self, problems: list[LineProblem]) -> None:
        def change(batch: BatchObject) -> None:
            batch.status, batch.failed_at = "failed", int(time.time())
            batch.errors = Problems(problems)

        self._catalog.change(self._batch.id, change)
        shutil.rmtree(self._folder, ignore_errors=True)


class _Observer:
    """An observer that leaves it to the job to look."""

    def progressed(self) -> None:
        """As `Observer.progressed`."""

    def set_aside(self, window: Window) -> None:
        """As `Observer.set_aside`."""


_WHY = {
    "expired": "This request could not be executed before the completion window expired.",
    "cancelled": "The batch was cancelled before this request was executed.",
}


def _ending_of(batch: BatchObject) -> str | None:
    """Why a batch is to end now; None: it is not."""
    if batch.status == "cancelling":
        return "cancelled"
    return "expired" if time.time() >= batch.expires_at else None


def _problem(text: str) -> LineProblem:
    """A problem as the journal words it: `line 3: what is wrong`."""
    place, _, message = text.partition(": ")
    number = place.removeprefix("line ")
    if not number.isdigit():
        return LineProblem("invalid_input", text)
    return LineProblem("invalid_json_line", message, int(number))
