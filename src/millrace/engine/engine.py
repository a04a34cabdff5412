"""The engine loop: plan a step, launch it, take the result of an earlier step.

With a pipeline depth of 1 the next step is planned and launched while the device still runs the
one before, and each result is read one step late. With depth 0 each result is awaited at once. So
it is behind a large piece of a long prompt alone: a request that arrives meanwhile joins the very
next step, and the device is idle for some milliseconds of many. The worker that runs the plans may
be one device, a group of ranks, or plain arithmetic in tests.

If a request follows a grammar, a step's token masks depend on the tokens of the step before. The
worker asks for them after it has launched the step's forward. By then the earlier step has ended or
soon will, and the masks are built while the device is busy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import msgspec

from millrace.config import EngineConfig
from millrace.engine.grammar import Grammars, GrammarState
from millrace.engine.plan_log import PlanLog, StepSizes
from millrace.engine.scheduler import Scheduler
from millrace.engine.step import StepTimes
from millrace.engine.worker_protocol import Account, Pending, Worker
from millrace.errors import RequestError, UserError
from millrace.protocol import AddRequest, Delta, EngineStats, Masks, StepPlan, StepResult

# How long a step waits for a grammar to compile if there is no other work; seconds.
GRAMMAR_WAIT = 0.005
TRANSFER_WAIT = 0.0005  # between looks whether a transfer has ended; seconds
# Prompt tokens of a step that takes long enough for nothing to be launched behind it: 30 ms and
# more of a model of 27B on an H200.
LARGE_PIECE = 512


@dataclass(slots=True)
class _LaunchedStep:
    """A launched step. planning .. ended: as in `StepTiming`. at: when, in seconds. masked: its
    sampled rows that follow a grammar, with request ids. last: nothing is launched behind it before
    it has ended. waited: how long the host waited for its result."""

    plan: StepPlan
    planning: float
    planned: float
    launched: float
    pending: Pending
    at: float
    masked: Sequence[tuple[int, str]]
    last: bool
    ended: float = 0.0
    waited: float = 0.0
    result: StepResult | None = None


class Engine:
    """The engine of one replica: a scheduler, and the worker that runs its plans.

    depth: steps launched ahead of the last known result. plan_log: a file for plans and results.
    check: test every invariant after each step. grammars: for structured outputs; None: requests
    that need a grammar are refused. account: adds up what steps compute. now, pause: the clock of
    `AddRequest.arrival`, and how the engine waits on it.
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
        account: Account | None = None,
        now: Callable[[], float] = monotonic,
        pause: Callable[[float], None] = sleep,
    ) -> None:
        self.config = config
        self.scheduler = scheduler
        self.worker = worker
        self._depth = depth
        self._log = PlanLog(plan_log) if plan_log else None
        self._sizes = StepSizes(scheduler.limits.drafts)
        self._check = check
        self._now, self._pause = now, pause
        self.grammars = grammars
        self.account = account
        self._compiling: dict[str, tuple[AddRequest, Future[GrammarState]]] = {}
        self._steps: deque[_LaunchedStep] = deque()
        self._immediate: list[Delta] = []  # ends of requests that no step brings
        has_device = config is not None and config.device != "cpu"
        self._step_times = StepTimes(overlaps=depth > 0, has_device=has_device)
        self._last_result = 0.0  # when the result of the newest step that has ended was there

    def add(self, request: AddRequest) -> None:
        """Queue a request. Raises RequestError if it can never run."""
        if request.grammar is None:
            self._immediate += self.scheduler.add(request)
        elif self.grammars is None:
            raise RequestError("this engine has no grammars", param="structured_outputs")
        else:
            self.scheduler.check(request)
            self._compiling[request.id] = request, self.grammars.compile(request)

    def abort(self, ids: Iterable[str]) -> None:
        """End requests. Unknown ids are allowed; no further Delta comes for any of them."""
        ids = list(ids)
        self._immediate = [delta for delta in self._immediate if delta.id not in ids]
        for request_id in ids:
            self._compiling.pop(request_id, None)
            self._drop_grammar(request_id)
        self.scheduler.abort(ids)

    def has_work(self) -> bool:
        return bool(self._compiling or self._immediate or self.scheduler.has_work())

    def step(self) -> list[Delta]:
        """Launch the next step, if there is one, and return the deltas that are due."""
        immediate, self._immediate = self._immediate + self._add_compiled(), []
        if self._steps and self._steps[-1].last:
            return immediate + self._commit(self._steps.popleft())
        self.poll()
        immediate, self._immediate = immediate + self._immediate, []
        began = self._now()
        plan = self.scheduler.plan(began)
        if plan is not None:
            self._launch(plan, began)
        if plan is None and not self._steps and self.scheduler.uses_tiers:
            self._pause(TRANSFER_WAIT)  # nothing to do until a transfer ends
        if not self._steps or (plan is not None and len(self._steps) <= self._depth):
            return immediate
        return immediate + self._commit(self._steps.popleft())

    def poll(self) -> None:
        """Take note of the transfers that have ended; an idle engine does so now and then."""
        if self.scheduler.uses_tiers:
            self._immediate += self.scheduler.transferred(self.worker.finished())

    def reset_prefix_cache(self) -> None:
        """Drop every cached prefix. Running requests keep their pages."""
        self.scheduler.reset_prefix_cache()

    def stats(self) -> EngineStats:
        """The scheduler's figures, and times of steps; requests whose grammars are compiled wait
        too."""
        stats, compiling = self.scheduler.stats(), len(self._compiling)
        return msgspec.structs.replace(
            stats,
            step_times=self._step_times.totals,
            waiting=stats.waiting + compiling,
            waiting_deferred=stats.waiting_deferred + compiling,
        )

    def close(self) -> None:
        """Wait for the launched steps, then free the worker."""
        while self._steps:
            self._result(self._steps.popleft())
        self.worker.close()
        if self.grammars:
            self.grammars.close()
        if self._log:
            self._log.close()

    # --- steps --------------------------------------------------------------------------------

    def _launch(self, plan: StepPlan, began: float) -> None:
        """began: when its planning did."""
        planning = self._now() - began
        if self._log:
            self._log.write(plan)
        planned = self._now()
        masked = self.scheduler.masked_rows() if self.grammars else []
        make = self._mask_builder(plan, masked) if masked else None
        at = monotonic()
        pending = self.worker.launch(plan, make)
        last, times = _is_large_piece(plan), (planning, planned, self._now())
        self._steps.append(_LaunchedStep(plan, *times, pending, at, masked, last))

    def _result(self, step: _LaunchedStep) -> StepResult:
        """A step's result. The first call waits for it and advances the grammars by its tokens."""
        if step.result is None:
            began = self._now()
            step.result = step.pending.result()
            step.ended = self._now()
            step.waited = step.ended - began
            for row, request_id in step.masked:
                assert self.grammars is not None
                drafts = step.result.drafts[row]
                self.grammars.advance(request_id, step.result.tokens[row], drafts)
        return step.result

    def _commit(self, step: _LaunchedStep) -> list[Delta]:
        result = self._result(step)
        # A step begins when it is launched, or when the one before has ended.
        now = monotonic()
        seconds, self._last_result = now - max(step.at, self._last_result), now
        self._step_times.add(step.plan, seconds, step.waited)
        if self._log:
            self._log.write(result)
        deltas = self.scheduler.commit(result, 0.0 if step.masked else seconds)
        if self.account is not None:
            self.account.add(*self.scheduler.committed_counts(), seconds)
        if self._log:
            times = step.planned, step.launched, step.ended, self._now()
            self._log.write(self._sizes.timing(step.plan, result, times, step.planning))
        if self._check:
            self.scheduler.check_integrity()
        return self._check_grammars(deltas, step) if step.masked else deltas

    # --- grammars -----------------------------------------------------------------------------

    def _add_compiled(self) -> list[Delta]:
        """Hand requests whose grammars are compiled to the scheduler. Returns ends of failed
        ones."""
        ended: list[Delta] = []
        if self._compiling and not self.scheduler.has_work():
            self._wait_for_grammar()
        ready = [key for key, (_, future) in self._compiling.items() if future.done()]
        for request_id in ready:
            request, future = self._compiling.pop(request_id)
            assert self.grammars is not None
            try:
                state = future.result()
                ended += self.scheduler.add(request)
                self.grammars.add(request_id, state)
            except UserError as error:
                ended.append(Delta(request_id, [], "error", error=str(error)))
        return ended

    def _wait_for_grammar(self) -> None:
        """Wait for the grammar that has been compiling longest, at most GRAMMAR_WAIT."""
        _, future = next(iter(self._compiling.values()))
        wait([future], timeout=GRAMMAR_WAIT)

    def _mask_builder(self, plan: StepPlan, rows: Sequence[tuple[int, str]]) -> Callable[[], Masks]:
        def make() -> Masks:
            assert self.grammars is not None
            for step in self._steps:  # the plan's own step is not among them yet
                self._result(step)
            masks = self.grammars.masks(plan, rows)
            if self._log:
                self._log.write(masks)
            return masks

        return make

    def _check_grammars(self, deltas: list[Delta], step: _LaunchedStep) -> list[Delta]:
        """The deltas, with an error for each request whose output does not match its grammar."""
        assert self.grammars is not None
        masked = {request_id for _, request_id in step.masked}
        out = []
        for delta in deltas:
            if delta.id in masked:
                failure = self.grammars.failure(delta.id)
                if failure is not None:
                    self.scheduler.abort([delta.id])
                    delta = Delta(delta.id, [], "error", error=f"grammar: {failure}")
                if delta.finish_reason is not None:
                    self._drop_grammar(delta.id)
            out.append(delta)
        return out

    def _drop_grammar(self, request_id: str) -> None:
        if self.grammars:
            self.grammars.remove(request_id)


def _is_large_piece(plan: StepPlan) -> bool:
    """Whether a step computes only prompts, none of them to its end, and many of their tokens."""
    ends = plan.decode or any(chunk.last for chunk in plan.chunks)
    return not ends and sum(chunk.count for chunk in plan.chunks) >= LARGE_PIECE
