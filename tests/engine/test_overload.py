"""More requests than slots: they wait, and cost those that run nothing.

Time is that of a model of steps (an H200's, per row and prompt token), so the ratios are exact.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from millrace.engine.engine import Engine
from millrace.engine.scheduler import Scheduler
from millrace.protocol import AddRequest, Limits, SamplingParams, StepPlan
from tests.support.fake_worker import FakeWorker

SLOTS, REQUESTS = 16, 256
STEP, ROW, PROMPT_TOKEN = 8.0, 0.15, 0.05  # milliseconds: of a step, and of what it computes


class Clock:
    """A worker's own time: that of the steps that it was given."""

    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker
        self.now = 0.0

    def launch(self, plan: StepPlan, masks: Any = None) -> Any:
        tokens = sum(chunk.count for chunk in plan.chunks)
        self.now += STEP + ROW * len(plan.decode) + PROMPT_TOKEN * tokens
        return self._worker.launch(plan, masks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)


def throughput(offered: int, pages: int, cached: bool) -> tuple[float, int]:
    """Output tokens a second while all slots are taken, with `offered` requests in the engine at
    all times, and preemptions."""
    limits = Limits(
        max_num_seqs=SLOTS, max_num_batched_tokens=96, max_model_len=128, page_size=8,
        num_pages=pages, num_snapshots=8 if cached else 0, drafts=1,
    )  # fmt: skip
    worker = FakeWorker(8, 1, 96, seed=1, policy=limits.cache_policy)
    clock = Clock(worker)
    engine = Engine(Scheduler(limits), clock, depth=1)  # type: ignore[arg-type]
    rng = random.Random(5)
    waiting = []
    for number in range(REQUESTS):
        prompt = [rng.randrange(1, 90) for _ in range(rng.randint(16, 48))]
        params = SamplingParams(max_tokens=rng.randint(16, 48), ignore_eos=True)
        waiting.append(AddRequest(f"r{number}", prompt, params))
    for _ in range(offered):
        engine.add(waiting.pop())
    ended, counted, began = 0, 0, 0.0
    drained: float | None = None
    while engine.has_work():
        for delta in engine.step():
            if ended >= SLOTS and drained is None:
                counted += len(delta.token_ids)
            if delta.finish_reason:
                ended += 1
                began = clock.now if ended == SLOTS else began
                if waiting:
                    engine.add(waiting.pop())
                if ended == REQUESTS - SLOTS:
                    drained = clock.now
    assert drained is not None
    preempted: int = engine.stats().preemptions
    return 1e3 * counted / (drained - began), preempted


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "prefix cache"])
@pytest.mark.parametrize("pages", [SLOTS * 16 + 1, SLOTS * 8 + 1], ids=["ample", "scarce"])
def test_eight_times_the_slots_costs_nothing(pages: int, cached: bool) -> None:
    """At least 99% of what the slots alone give, also where pages run out before slots do."""
    alone, before = throughput(SLOTS, pages, cached)
    crowded, after = throughput(8 * SLOTS, pages, cached)
    assert crowded >= 0.99 * alone
    assert after <= before + 2
