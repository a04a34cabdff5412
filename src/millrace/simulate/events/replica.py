"""One replica on the virtual clock: the engine's own loop and scheduler, and its API server.

The loop is `millrace.engine.engine.Engine`, the scheduler the one that serves; only the worker
computes nothing. A step of the loop is one call on the clock, at the moment at which the loop takes
new requests in. The API server is one thread: what it does for requests and chunks comes one after
the other. Which request comes here is not decided here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec

from millrace.engine.engine import Engine
from millrace.engine.scheduler import Scheduler
from millrace.errors import RequestError
from millrace.protocol import AddRequest, Delta, EngineStats
from millrace.simulate.common.options import ReplicaKind
from millrace.simulate.common.virtual_clock import VirtualClock, VirtualTimer
from millrace.simulate.events.record_links import RecordLinks
from millrace.simulate.events.worker import HostTime, SimulatedWorker

_STALLED = 0.001  # seconds between two looks of a loop that has work and nothing to launch
_MOST_STALLS = 100_000


# What one step brought, and when each of it leaves the API server; called when the step ends.
Deliver = Callable[[Sequence[Delta], Sequence[float]], None]


class SimulatedReplica:
    """See the module. lengths: as in SimulatedWorker. check: test all invariants at each step.
    links: to replicas that hand records over; number: of this one."""

    def __init__(
        self,
        clock: VirtualClock,
        kind: ReplicaKind,
        deliver: Deliver,
        lengths: Mapping[int, int],
        seed: int,
        check: bool = False,
        links: RecordLinks | None = None,
        number: int = 0,
    ) -> None:
        self._clock, self._deliver = clock, deliver
        self._thread = HostTime()
        limits = kind.limits
        self.worker = SimulatedWorker(
            self._thread,
            kind.model,
            kind.speeds,
            width=limits.drafts + 1,
            lengths=lengths,
            seed=seed,
            page_bytes=limits.page_bytes,
            snapshot_bytes=limits.snapshot_bytes,
            links=links,
            replica=number,
        )
        self.engine = Engine(
            Scheduler(limits),
            self.worker,
            depth=kind.depth,
            check=check,
            now=self._thread.now,
            pause=self._thread.spend,
        )
        self._cost = kind.api_server
        self._server_free = 0.0
        self._arrived: deque[tuple[float, AddRequest]] = deque()
        self._aborted: list[str] = []
        self._timer: VirtualTimer | None = None
        self._stalls = self._steps = 0
        self.alive, self.silent = True, False

    def send(self, request: AddRequest) -> None:
        """A request has reached the API server."""
        now = self._clock.now()
        self._server_free = max(self._server_free, now) + self._cost.request
        request = msgspec.structs.replace(request, arrival=self._server_free)
        self._arrived.append((self._server_free, request))
        self._wake(self._server_free)

    def abort(self, ids: Sequence[str]) -> None:
        """The clients of these requests are gone."""
        self._aborted += ids
        self._wake(self._clock.now())

    def kill(self, silent: bool = False) -> None:
        """Nothing more comes from it. silent: it does not even refuse connections."""
        self.alive, self.silent = False, silent
        if self._timer is not None:
            self._timer.cancel()

    def stats(self) -> EngineStats:
        """The engine's own figures, with the requests that it has not taken in yet."""
        stats = self.engine.stats()
        return msgspec.structs.replace(stats, waiting=stats.waiting + len(self._arrived))

    def _wake(self, moment: float) -> None:
        if self._timer is None and self.alive:
            self._timer = self._clock.call_at(moment, self._step)

    def _step(self) -> None:
        """One turn of the engine's loop."""
        self._timer = None
        began = self._clock.now()
        self._thread.wait_until(began)
        refused = self._take_in(began)
        deltas = refused + (self.engine.step() if self.engine.has_work() else [])
        ended = self._thread.moment
        if deltas:
            self._clock.call_at(ended, self._send_out, deltas)
        if self.engine.has_work():
            self._wake(self._next_turn(began, ended, bool(deltas)))
        elif self._arrived:
            self._wake(max(ended, self._arrived[0][0]))

    def _take_in(self, now: float) -> list[Delta]:
        """Hand the engine what has come. Returns the refusals."""
        refused = []
        while self._arrived and self._arrived[0][0] <= now:
            _, request = self._arrived.popleft()
            try:
                self.engine.add(request)
            except RequestError as error:
                refused.append(Delta(request.id, [], "error", error=str(error)))
        if self._aborted:
            self.engine.abort(self._aborted)
            self._aborted = []
        return refused

    def _next_turn(self, began: float, ended: float, brought: bool) -> float:
        if ended > began or brought or self._has_launched():
            self._stalls = 0
            return ended
        self._stalls += 1
        if self._stalls > _MOST_STALLS:
            raise RuntimeError("the engine has work and plans no step")
        return ended + _STALLED

    def _has_launched(self) -> bool:
        """Whether the last turn has launched a step."""
        before, self._steps = self._steps, self.worker.launched
        return self._steps > before

    def _send_out(self, deltas: Sequence[Delta]) -> None:
        """The API server passes on what a step brought, one chunk after the other."""
        if not self.alive:
            return
        now = self._clock.now()
        leaves = []
        free = max(self._server_free, now)
        for _ in deltas:
            free += self._cost.chunk
            leaves.append(free)
        self._server_free = free
        self._deliver(deltas, leaves)
