"""The loop: plan a step, launch it, take the result of an earlier one.

With a pipeline depth of 1 the next step is planned and launched while the device still runs the
one before, and its result is read one step late; with depth 0 each result is awaited at once. The
worker behind it may be one device, a group of ranks or, in tests, plain arithmetic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from time import monotonic

from millrace.config import EngineConfig
from millrace.engine.planlog import PlanLog
from millrace.engine.scheduler import Scheduler
from millrace.engine.worker import Pending, Worker
from millrace.protocol import AddRequest, Delta, EngineStats, StepResult


class Engine:
    """One replica: a scheduler and the worker that carries its plans out."""

    def __init__(
        self,
        scheduler: Scheduler,
        worker: Worker,
        *,
        depth: int = 0,
        plan_log: Path | None = None,
        check: bool = False,
        config: EngineConfig | None = None,
    ) -> None:
        self.config = config
        self.scheduler = scheduler
        self._worker = worker
        self._depth = depth
        self._log = PlanLog(plan_log) if plan_log else None
        self._check = check
        self._pending: deque[Pending] = deque()

    def add(self, request: AddRequest) -> None:
        """Queue a request. Raises RequestError for one that can never run."""
        self.scheduler.add(request)

    def abort(self, ids: Iterable[str]) -> None:
        """End requests, known or not; they bring no further Delta."""
        self.scheduler.abort(ids)

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def step(self) -> list[Delta]:
        """Launch the next step if there is one, and take a result if one is due."""
        plan = self.scheduler.plan(monotonic())
        if plan is not None:
            if self._log:
                self._log.write(plan)
            self._pending.append(self._worker.launch(plan))
        if not self._pending or (plan is not None and len(self._pending) <= self._depth):
            return []
        return self._commit(self._pending.popleft().result())

    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    def close(self) -> None:
        """Let launched steps end, then free the worker."""
        while self._pending:
            self._pending.popleft().result()
        self._worker.close()
        if self._log:
            self._log.close()

    def _commit(self, result: StepResult) -> list[Delta]:
        if self._log:
            self._log.write(result)
        deltas = self.scheduler.commit(result)
        if self._check:
            self.scheduler.check_integrity()
        return deltas
