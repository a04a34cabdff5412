"""A rank that fails at a stage of its start, for tests/runtime/ranks/test_starts.py.

Run as `python -m tests.support.failing_rank STAGE WAY NOTE ...`, followed by the arguments of a
rank. When it fails it writes the time into the file NOTE.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = ("groups", "measuring", "weights", "profile run", "capture", "first step")
WAYS = ("kill", "stop", "raise")
AFTER = 3  # all-reduces of a stage that still succeed


def as_on_a_gpu(set_attribute: Callable[[Any, str, Any], object] = setattr) -> None:
    """Make CPU ranks profile and capture as GPU ranks do; a captured step just runs."""
    from millrace.protocol import StepPlan
    from millrace.runtime import profile_run
    from millrace.runtime.ranks.ranks import Ranks
    from millrace.runtime.step.cuda_graphs import GraphSizes
    from millrace.runtime.step.runner import Runner
    from millrace.runtime.worker import Worker

    plan_memory, record = Worker.divide_memory, Runner.capture

    def plan(self: Worker) -> Any:
        profile = profile_run.ProfileRun.of(self.config)
        scratch = self.build_runner(profile.scratch_config, 1, 0)
        profile.run(scratch)
        scratch.capture(self.config)
        return plan_memory(self)

    def capture(self: Runner, config: Any, largest_only: bool = False) -> int:
        # A GPU runs each part once before it records it. Rows of the null slot would be padding.
        count = record(self, config, largest_only)
        for rows in GraphSizes.of(config).rows:
            self.run(StepPlan(0, [], [], [1] * rows, [], [], 1))
        return count

    set_attribute(Worker, "divide_memory", plan)
    set_attribute(Ranks, "wait_for_device", Ranks.check)
    set_attribute(Runner, "capture", capture)


def fail_at(stage: str, fail: Callable[[], None]) -> None:
    """Make this process fail at a stage: at its start, or in one of its all-reduces."""
    from millrace.runtime import profile_run, worker
    from millrace.runtime.ranks import ranks
    from millrace.runtime.step import runner

    owner, name = {
        "groups": (ranks, "form_groups"),
        "measuring": (worker.AllReduce, "measure"),
        "weights": (worker, "load_model"),
        "profile run": (profile_run.ProfileRun, "run"),
        "capture": (runner.Runner, "capture"),
        "first step": (worker.Worker, "follow"),
    }[stage]
    original = getattr(owner, name)
    # A measured all-reduce is called directly; any other asks for its algorithm first.
    all_reduce = (
        (ranks.Ranks, "all_reduce") if stage == "measuring" else (worker.AllReduce, "algorithm_for")
    )
    run_all_reduce, left = getattr(*all_reduce), [AFTER]

    def counted(*given: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            fail()
        return run_all_reduce(*given)

    def begin(*given: Any, **named: Any) -> Any:
        if stage in ("groups", "weights"):
            fail()
        setattr(*all_reduce, counted)
        return original(*given, **named)

    setattr(owner, name, begin)


def main() -> int:
    stage, way, note = sys.argv[1:4]
    sys.argv[1:4] = []

    def fail() -> None:
        Path(note).write_text(str(time.time()))
        if way == "raise":
            raise OSError("out of luck")
        os.kill(os.getpid(), signal.SIGKILL if way == "kill" else signal.SIGSTOP)

    if '"cuda"' not in " ".join(sys.argv):
        as_on_a_gpu()
    fail_at(stage, fail)
    from millrace.replica.process import main as be_a_rank

    return be_a_rank()


if __name__ == "__main__":
    sys.exit(main())
