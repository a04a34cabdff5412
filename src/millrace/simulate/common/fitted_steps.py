"""Step times from an engine's own plan log: linear in what a step computes.

It is for engines on machines that no table knows, such as this one's CPU. The plan log says when
each step was planned and ended, and how large it was. Which process wrote it is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from millrace.engine.plan_log import read
from millrace.errors import UserError
from millrace.model.work import StepShape
from millrace.plan.model.step_model import ApiServer, StartUp, StepTimes
from millrace.protocol import StepPlan, StepResult, StepTiming

LEAST_STEPS = 50
_TERMS = ("decode_rows", "decode_context", "prompts", "prompt_tokens", "prompt_attention")
_LATE = 0.99  # quantile of the times of steps: what is above four times that is cut


class FittedSteps(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds: a base, and so much for each unit of `weights`, by name of StepShape's fields.

    jitter: relative spread of single steps around that. steps: how many it was fitted to.
    """

    base: float
    weights: dict[str, float]
    jitter: float = 0.0
    steps: int = 0
    server: ApiServer = ApiServer()
    start_up: StartUp = StartUp()

    def times(self, shape: StepShape) -> StepTimes:
        """Seconds of a step; all of them count as the device's."""
        seconds = self.base + sum(
            weight * getattr(shape, name) for name, weight in self.weights.items()
        )
        return StepTimes(0.0, seconds)


class _Step(msgspec.Struct, frozen=True):
    values: tuple[float, ...]
    seconds: float


def fit_plan_logs(paths: Sequence[Path], begin: float = 0.0, end: float = np.inf) -> FittedSteps:
    """Fit to steps of some plan logs, planned between two moments of their clock.

    Raises UserError for a file that is none, and for too few steps.
    """
    steps = [step for path in paths for step in _steps(path, begin, end)]
    if len(steps) < LEAST_STEPS:
        names = ", ".join(str(path) for path in paths)
        raise UserError(f"{names}: {len(steps)} steps with times; {LEAST_STEPS} or more are needed")
    values = np.array([(1.0, *step.values) for step in steps])
    seconds = np.array([step.seconds for step in steps])
    seconds = np.minimum(seconds, 4 * np.quantile(seconds, _LATE))
    found = _non_negative(values, seconds)
    spread = np.log(np.maximum(seconds, 1e-9) / np.maximum(values @ found, 1e-9))
    return FittedSteps(
        base=float(found[0]),
        weights=dict(zip(_TERMS, found[1:].tolist(), strict=True)),
        jitter=float(min(0.5, np.median(np.abs(spread - np.median(spread))) * 1.4826)),
        steps=len(steps),
    )


def _steps(path: Path, begin: float, end: float) -> Iterator[_Step]:
    """Steps whose time is known: until the next one is planned, if requests were running; with a
    pipeline, from the end of the step before."""
    plans: dict[int, StepPlan] = {}
    running = _Running()
    waiting: tuple[StepTiming, bool] | None = None
    for entry in read(path):
        if isinstance(entry, StepPlan):
            plans[entry.step] = entry
            running.admit(entry)
        elif isinstance(entry, StepResult):
            running.take(entry)
        elif isinstance(entry, StepTiming):
            if waiting is not None and begin <= waiting[0].planned <= end:
                yield from _timed(plans.pop(waiting[0].step, None), *waiting, entry)
            waiting = entry, bool(running)


class _Running:
    """The requests that have a slot and have not ended, from plans and results."""

    def __init__(self) -> None:
        self._left: dict[int, int] = {}  # tokens by slot
        self._stops: dict[int, set[int]] = {}

    def __bool__(self) -> bool:
        return any(left > 0 for left in self._left.values())

    def admit(self, plan: StepPlan) -> None:
        for one in plan.admissions:
            self._left[one.slot] = one.max_total - len(one.tokens)
            self._stops[one.slot] = set(one.stop_token_ids)

    def take(self, result: StepResult) -> None:
        for slot, tokens in zip(result.slots, result.tokens, strict=True):
            stopped = bool(tokens) and tokens[-1] in self._stops.get(slot, ())
            self._left[slot] = 0 if stopped else self._left.get(slot, 0) - len(tokens)


def _timed(
    plan: StepPlan | None, timing: StepTiming, busy: bool, following: StepTiming
) -> Iterator[_Step]:
    if plan is None or not (plan.decode or plan.chunks):
        return
    if following.planned < timing.ended:
        seconds = timing.wall
    elif busy:
        seconds = following.planned - timing.planned
    else:
        seconds = timing.committed - timing.planned
    yield _Step(
        (
            float(len(plan.decode)),
            float(timing.sum_decode_kv_tokens),
            float(len(plan.chunks)),
            float(sum(chunk.count for chunk in plan.chunks)),
            float(sum(c.count * (c.start + c.count / 2) for c in plan.chunks)),
        ),
        seconds,
    )


def _non_negative(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares without negative weights: those that would be are left out, one by one."""
    scale = np.maximum(np.abs(values).max(axis=0), 1e-12)
    kept = list(range(values.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(values[:, kept] / scale[kept], wanted, rcond=None)
        if found.min() >= 0 or len(kept) == 1:
            break
        del kept[int(found.argmin())]
    weights = np.zeros(values.shape[1])
    weights[kept] = np.maximum(found, 0.0) / scale[kept]
    return weights
