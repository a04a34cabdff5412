"""The clients of a simulated run: who sends what, and when, as `millrace bench` does.

Closed loop (a limit on conversations in flight), open loop (arrival times), or both; for a number
of conversations or for a time. A conversation holds its slot through all its turns. This module
knows no replica.
"""

from __future__ import annotations

from collections.abc import Iterator

from millrace.bench.load.arrivals import Schedule, due_times
from millrace.bench.load.load_driver import Job
from millrace.simulate.common.outcome import Records
from millrace.simulate.common.virtual_clock import VirtualClock
from millrace.simulate.events.gateway import SimulatedExchange, SimulatedGateway
from millrace.simulate.events.workload import Requests, answer_text

RETRY_AFTER = 1.0  # seconds that a client waits before its next request, where one was refused


class Clients:
    """See the module. limit: the most conversations in flight; until: seconds after which no more
    are begun."""

    def __init__(
        self,
        clock: VirtualClock,
        gateway: SimulatedGateway,
        requests: Requests,
        schedule: Schedule,
        records: Records,
        *,
        limit: int | None,
        until: float | None,
    ) -> None:
        self._clock, self._gateway, self._requests = clock, gateway, requests
        self._records = records
        self._jobs: Iterator[tuple[Job, float | None]] = zip(
            requests.first_turns(), due_times(schedule), strict=False
        )
        self._limit, self._until = limit, until
        self._next: tuple[Job, float | None] | None = None
        self._exhausted = self._waiting = False
        self.in_flight = 0
        self.requests_sent = self.requests_ended = 0

    @property
    def done(self) -> bool:
        """Whether nothing is in flight and nothing more is sent."""
        return self._exhausted and self.in_flight == 0

    def start(self) -> None:
        """Begin to send."""
        self._dispatch()

    def _dispatch(self) -> None:
        """Begin all conversations that can begin now."""
        self._waiting = False
        while not self._exhausted:
            if self._next is None:
                self._next = next(self._jobs, None)
            if self._next is None or self._is_late():
                self._exhausted = True
                return
            job, due = self._next
            if due is not None and due > self._clock.now():
                self._waiting = True
                self._clock.call_at(due, self._dispatch)
                return
            if self._limit is not None and self.in_flight >= self._limit:
                return
            self._next = None
            self.in_flight += 1
            self._send(job, self._clock.now() if due is None else due)

    def _is_late(self) -> bool:
        assert self._next is not None
        due = self._next[1]
        moment = self._clock.now() if due is None else max(due, self._clock.now())
        return self._until is not None and moment >= self._until

    def _send(self, job: Job, due: float) -> None:
        request = self._requests.prepare(job)
        now = self._clock.now()
        record = self._records.add(due, now, len(request.tokens), job.turn)
        self.requests_sent += 1
        self._gateway.submit(request, record, self._ended)

    def _ended(self, exchange: SimulatedExchange) -> None:
        self.requests_ended += 1
        job = exchange.request.job
        following = None
        if job.then is not None and not exchange.record.failed:
            following = job.then(answer_text(exchange.made))
        if following is not None:
            self._clock.call_later(following.pause, self._send_later, following)
            return
        # A client that was refused waits, so that an outage does not use up the workload.
        self._clock.call_later(RETRY_AFTER if exchange.record.failed else 0.0, self._leave)

    def _send_later(self, job: Job) -> None:
        self._send(job, self._clock.now())

    def _leave(self) -> None:
        """A conversation has ended: its slot is free."""
        self.in_flight -= 1
        if not self._waiting:
            self._dispatch()
