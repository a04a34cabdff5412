"""The loop: plan a step, launch it, take the result of an earlier one.

With a pipeline depth of 1 the next step is planned and launched while the device still runs the
one before, and its result is read one step late; with depth 0 each result is awaited at once. The
worker behind it may be one device, a group of ranks or, in tests, plain arithmetic.

Where a request follows a grammar, the step's masks depend on the tokens of the step before. They
are worked out when the worker asks for them, which is behind the start of the step's forward: the
earlier step has ended by then or soon will, and the device is busy meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from millrace.config import EngineConfig
from millrace.engine.grammar import Follower, Grammars
from millrace.engine.plan_log import PlanLog
from millrace.engine.scheduler import Scheduler
from millrace.engine.worker_protocol import Pending, Worker
from millrace.errors import RequestError, UserError
from millrace.protocol import AddRequest, Delta, EngineStats, Masks, StepPlan, StepResult

# While nothing but grammars in the making is there, a step waits this long for one: seconds.
PREPARE_WAIT = 0.005


@dataclass(slots=True)
class _Launched:
    """A step under way. masked: its sampled rows that follow a grammar, with request ids."""

    pending: Pending
    masked: Sequence[tuple[int, str]]
    result: StepResult | None = None


class Engine:
    """One replica: a scheduler and the worker that carries its plans out.

    grammars: what structured outputs need; without it they are refused.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        worker: Worker,
        *,
        depth: int = 0,
        plan_log: Path | None = None,
        check: bool = False,
        config: EngineConfig | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.config = config
        self.scheduler = scheduler
        self._worker = worker
        self._depth = depth
        self._log = PlanLog(plan_log) if plan_log else None
        self._check = check
        self._grammars = grammars
        self._preparing: dict[str, tuple[AddRequest, Future[Follower]]] = {}
        self._launched: deque[_Launched] = deque()
        self._early: list[Delta] = []  # ends that no step brings

    def add(self, request: AddRequest) -> None:
        """Queue a request. Raises RequestError for one that can never run."""
        if request.grammar is None:
            self._early += self.scheduler.add(request)
        elif self._grammars is None:
            raise RequestError("this engine has no grammars", param="structured_outputs")
        else:
            self.scheduler.check(request)
            self._preparing[request.id] = request, self._grammars.prepare(request)

    def abort(self, ids: Iterable[str]) -> None:
        """End requests, known or not; they bring no further Delta."""
        ids = list(ids)
        self._early = [delta for delta in self._early if delta.id not in ids]
        for request_id in ids:
            self._preparing.pop(request_id, None)
            self._forget(request_id)
        self.scheduler.abort(ids)

    def has_work(self) -> bool:
        return bool(self._preparing or self._early or self.scheduler.has_work())

    def step(self) -> list[Delta]:
        """Launch the next step if there is one, and take a result if one is due."""
        early, self._early = self._early + self._admit_prepared(), []
        plan = self.scheduler.plan(monotonic())
        if plan is not None:
            self._launch(plan)
        if not self._launched or (plan is not None and len(self._launched) <= self._depth):
            return early
        return early + self._commit(self._launched.popleft())

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; running requests keep what they hold."""
        self.scheduler.reset_prefix_cache()

    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    def close(self) -> None:
        """Let launched steps end, then free the worker."""
        while self._launched:
            self._result(self._launched.popleft())
        self._worker.close()
        if self._grammars:
            self._grammars.close()
        if self._log:
            self._log.close()

    # --- steps --------------------------------------------------------------------------------

    def _launch(self, plan: StepPlan) -> None:
        if self._log:
            self._log.write(plan)
        masked = self.scheduler.masked_rows() if self._grammars else []
        make = self._masks_of(plan, masked) if masked else None
        self._launched.append(_Launched(self._worker.launch(plan, make), masked))

    def _result(self, step: _Launched) -> StepResult:
        """A step's result; the first to ask waits for it and moves the grammars on."""
        if step.result is None:
            step.result = step.pending.result()
            for row, request_id in step.masked:
                assert self._grammars is not None
                drafts = step.result.drafts[row]
                self._grammars.advance(request_id, step.result.tokens[row], drafts)
        return step.result

    def _commit(self, step: _Launched) -> list[Delta]:
        result = self._result(step)
        if self._log:
            self._log.write(result)
        deltas = self.scheduler.commit(result)
        if self._check:
            self.scheduler.check_integrity()
        return self._watch_grammars(deltas, step) if step.masked else deltas

    # --- grammars -----------------------------------------------------------------------------

    def _admit_prepared(self) -> list[Delta]:
        """Requests whose grammars are ready go to the scheduler; the ends of those that failed."""
        ended: list[Delta] = []
        if self._preparing and not self.scheduler.has_work():
            self._await_one()
        ready = [key for key, (_, future) in self._preparing.items() if future.done()]
        for request_id in ready:
            request, future = self._preparing.pop(request_id)
            assert self._grammars is not None
            try:
                follower = future.result()
                ended += self.scheduler.add(request)
                self._grammars.enter(request_id, follower)
            except UserError as error:
                ended.append(Delta(request_id, [], "error", error=str(error)))
        return ended

    def _await_one(self) -> None:
        """Sleep until the oldest grammar in the making is ready, or a little while."""
        _, future = next(iter(self._preparing.values()))
        wait([future], timeout=PREPARE_WAIT)

    def _masks_of(self, plan: StepPlan, rows: Sequence[tuple[int, str]]) -> Callable[[], Masks]:
        def make() -> Masks:
            assert self._grammars is not None
            for step in self._launched:  # all but this plan's own, which is not there yet
                self._result(step)
            masks = self._grammars.masks(plan, rows)
            if self._log:
                self._log.write(masks)
            return masks

        return make

    def _watch_grammars(self, deltas: list[Delta], step: _Launched) -> list[Delta]:
        """The deltas, an error in place of what left its grammar; ended requests are forgotten."""
        assert self._grammars is not None
        masked = {request_id for _, request_id in step.masked}
        out = []
        for delta in deltas:
            if delta.id in masked:
                failure = self._grammars.failure(delta.id)
                if failure is not None:
                    self.scheduler.abort([delta.id])
                    delta = Delta(delta.id, [], "error", error=f"grammar: {failure}")
                if delta.finish_reason is not None:
                    self._forget(delta.id)
            out.append(delta)
        return out

    def _forget(self, request_id: str) -> None:
        if self._grammars:
            self._grammars.leave(request_id)
