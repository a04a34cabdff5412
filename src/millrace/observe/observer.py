"""The loop that samples targets and this host once a second, whatever happens to them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from millrace.common.http_client import Target, fetch
from millrace.errors import UserError
from millrace.observe.progress import Progress
from millrace.observe.samples import pages
from millrace.observe.samples.clock import Clock, ClockOffset
from millrace.observe.samples.host import Host
from millrace.observe.samples.sample import Row, first, rows_of
from millrace.observe.samples.store import Store

log = logging.getLogger(__name__)

TIMEOUT = 2.0  # seconds for one page
NOTE_EVERY = 10.0  # seconds between two lines of figures in the log


class Watched:
    """One target. name: its address. kind: what its page is of, once it has answered. gone: it has
    not answered the last time. restarts: seen so far."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.name = target.authority
        self.kind = ""
        self.offset = ClockOffset()
        self.gone = False
        self.restarts = 0
        self._started = 0.0

    async def sample(self, clock: Clock) -> list[Row]:
        """Its figures of now, and `up`; only that where it does not answer."""
        sent = clock.now()
        try:
            path = "" if self.target.prefix.endswith("/metrics") else "/metrics"
            response = await fetch(self.target, path, timeout=TIMEOUT)
            if response.status != 200:
                raise ConnectionError(f"status {response.status}")
            text = response.body.decode("utf-8", "replace")
            received = clock.now()
            t = (sent + received) / 2
            self.kind = self.kind or pages.kind_of(text) or "other"
            rows = list(pages.read(t, self.name, text))
        except (OSError, ValueError) as error:
            if not self.gone:
                log.warning("%s: no figures (%s); it is asked again", self.name, error)
            self.gone = True
            return rows_of(sent, self.name, {"up": 0.0})
        self._notice(rows)
        self.offset.add(response.headers.get("date", ""), sent, received)
        return [*rows, *rows_of(t, self.name, {"up": 1.0, "scrape_seconds": received - sent})]

    def _notice(self, rows: Sequence[Row]) -> None:
        """Log that it is back, or was started again."""
        started = first(rows, "process_start_time_seconds") or 0.0
        if self._started and started > self._started:
            self.restarts += 1
            log.warning("%s was started again", self.name)
        elif self.gone:
            log.warning("%s answers again", self.name)
        self._started, self.gone = started or self._started, False


class Observer:
    """Samples into a store. host: this machine; None: only targets. interval: seconds."""

    def __init__(
        self,
        targets: Sequence[Target],
        store: Store,
        *,
        host: Host | None,
        interval: float = 1.0,
        clock: Clock | None = None,
    ) -> None:
        self.watched = [Watched(target) for target in targets]
        self._store, self._host, self._interval = store, host, interval
        self.clock = clock or Clock()
        self._stopped = asyncio.Event()
        self._progress = Progress()
        self._unwritten = ""  # why the last samples could not be written

    def stop(self) -> None:
        self._stopped.set()

    async def run(self, duration: float = 0.0, on_tick: Callable[[], None] = lambda: None) -> None:
        """Sample until `stop`, or for so many seconds; 0: until `stop`. What was sampled is stored
        in any case."""
        began = noted = self.clock.now()
        self._note(began)
        tick = 0
        try:
            while not self._stopped.is_set():
                await self._sample()
                on_tick()
                tick += 1
                wait = began + tick * self._interval - self.clock.now()
                if wait < 0:  # late: skip what is past, so that times stay even
                    tick = int((self.clock.now() - began) / self._interval) + 1
                    wait = began + tick * self._interval - self.clock.now()
                if duration and tick * self._interval > duration:
                    break
                if self.clock.now() - noted >= NOTE_EVERY:
                    noted = self.clock.now()
                    self._report_progress(began)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), wait)
        finally:
            self._store.flush()
            self._note(began)

    async def _sample(self) -> None:
        answers = asyncio.gather(*(one.sample(self.clock) for one in self.watched))
        rows = await asyncio.to_thread(self._host.read, self.clock.now()) if self._host else []
        for one, found in zip(self.watched, await answers, strict=True):
            rows += self._once(one, found)
        rows.sort(key=lambda row: row.t)
        self._progress.add(rows)
        try:
            self._store.add(rows)
        except UserError as error:
            if not self._unwritten:
                log.warning("%s; samples wait in memory, and it is tried again", error)
            self._unwritten = str(error)
        else:
            if self._unwritten and not self._store.waits:
                log.warning("samples can be written again; %d were lost", self._store.lost)
                self._unwritten = ""

    def _report_progress(self, began: float) -> None:
        """A line of figures, and what is known of the targets, while it runs."""
        log.info("%s", self._progress.line())
        with contextlib.suppress(UserError):  # said already, where samples cannot be written
            self._note(began)

    def _once(self, one: Watched, rows: list[Row]) -> list[Row]:
        """Without what a gateway's page says of engines that are watched themselves."""
        if one.kind != "gateway" or all(other.kind != "engine" for other in self.watched):
            return rows
        return [row for row in rows if not row.name.startswith(("millrace:", "vllm:"))]

    def _note(self, began: float) -> None:
        self._store.note(
            {
                "began": began,
                "ended": self.clock.now(),
                "interval": self._interval,
                "gpus": self._host.gpus() if self._host else {},
                "problems": self._host.problems if self._host else [],
                "targets": {
                    one.name: {
                        "kind": one.kind,
                        "restarts": one.restarts,
                        "clock_offset": one.offset.offset if one.offset.known else None,
                        "clock_error": one.offset.error if one.offset.known else None,
                    }
                    for one in self.watched
                },
            }
        )
