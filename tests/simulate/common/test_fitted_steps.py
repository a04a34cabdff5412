"""Step times from a plan log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from millrace.common.framing import Framing
from millrace.engine.plan_log import Entry
from millrace.errors import UserError
from millrace.model.work import StepShape
from millrace.protocol import Admission, Chunk, StepPlan, StepResult, StepTiming
from millrace.simulate.common.fitted_steps import fit_plan_logs

FRAMING: Framing[Entry] = Framing(Entry, longest=1 << 20)


def log(path: Path, steps: int, *, idle: float = 0.0, pipelined: bool = False) -> Path:
    """Steps of 10 ms, 1 ms for each decode row and 0.1 ms for each prompt token; `idle` seconds
    between them with nothing to do."""
    rng, now, ended = np.random.default_rng(0), 0.0, 0.0
    entries: list[Entry] = []
    for number in range(steps):
        rows, tokens = int(rng.integers(1, 9)), int(rng.integers(0, 100))
        seconds = 0.010 + 0.001 * rows + 1e-4 * tokens
        chunks = [Chunk(20, 0, tokens, False)] if tokens else []
        left = 1 if idle else 10_000  # tokens: after each step of an idle log nothing runs
        admissions = [
            Admission(slot, [1] * 5, 0, -1, 5 + left, 0.0, 1.0, 0, 0, []) for slot in range(rows)
        ]
        plan = StepPlan(number, admissions, [], list(range(rows)), chunks, [], 100)
        begins = max(now, ended)
        timing = StepTiming(
            step=number,
            planned=now,
            launched=now,
            ended=begins + seconds,
            committed=begins + seconds,
            planning=0.0,
            wall=seconds,
            sum_decode_kv_tokens=5 * rows,
        )
        result = StepResult(number, list(range(rows)), [[7]] * rows)
        entries += [plan, result, timing]
        now = (ended or begins) if pipelined else begins + seconds + idle
        ended = begins + seconds
    path.write_bytes(b"".join(FRAMING.encode(entry) for entry in entries))
    return path


@pytest.mark.parametrize("idle", [0.0, 3.0])
@pytest.mark.parametrize("pipelined", [False, True])
def test_a_fit_finds_what_a_step_costs(tmp_path: Path, idle: float, pipelined: bool) -> None:
    fitted = fit_plan_logs([log(tmp_path / "log", 300, idle=idle, pipelined=pipelined)])
    assert fitted.steps >= 298
    for rows, tokens in ((1, 0), (8, 0), (4, 64)):
        shape = StepShape.of(rows=rows, context=5, prompts=int(tokens > 0), length=tokens)
        wanted = 0.010 + 0.001 * rows + 1e-4 * tokens
        assert sum(fitted.times(shape)) == pytest.approx(wanted, rel=0.02)
    assert fitted.jitter < 0.01
    assert min(fitted.weights.values()) >= 0


def test_only_steps_between_two_moments_count(tmp_path: Path) -> None:
    path = log(tmp_path / "log", 300)
    assert fit_plan_logs([path], 1.0, 3.0).steps < fit_plan_logs([path]).steps
    with pytest.raises(UserError, match="0 steps with times; 50 or more"):
        fit_plan_logs([path], 1e9)


def test_a_file_that_is_no_plan_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"no plan log at all")
    with pytest.raises(UserError, match="no plan log"):
        fit_plan_logs([path])
