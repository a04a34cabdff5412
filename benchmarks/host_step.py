"""Host time of a step: plan, commit, accounting and their messages, without a model.

    python benchmarks/host_step.py [--sequences 256]

Every row decodes and yields two tokens. Prints the median and the minimum of 300 steps, in ms.
"""

from __future__ import annotations

import argparse
import statistics
import time

import msgspec

from millrace.engine.scheduler import Scheduler
from millrace.model.work import Accounted, Formats, WorkAccount
from millrace.plan.facts.models import model_config
from millrace.protocol import AddRequest, Limits, Outputs, SamplingParams, StepPlan, StepResult

encode = msgspec.msgpack.Encoder().encode


def ready(sequences: int) -> Scheduler:
    """A scheduler whose `sequences` requests all decode."""
    limits = Limits(
        max_num_seqs=sequences,
        max_num_batched_tokens=32 * sequences,
        max_model_len=4096,
        page_size=16,
        num_pages=200 * sequences,
        num_snapshots=0,
        drafts=1,
    )
    scheduler = Scheduler(limits)
    params = SamplingParams(max_tokens=4000, ignore_eos=True)
    for number in range(sequences):
        scheduler.add(AddRequest(f"request-{number}", [number + 1] * 24, params))
    plan = planned(scheduler)
    slots = [chunk.slot for chunk in plan.chunks]
    scheduler.commit(StepResult(plan.step, slots, [[7] for _ in slots]))
    return scheduler


def planned(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.plan()
    assert plan is not None
    return plan


def account() -> WorkAccount:
    config = model_config("qwen3.5-27b")
    return WorkAccount(Accounted(config, Formats(weights="fp8", kv="fp8"), head_drafts=1))


def step(scheduler: Scheduler, account: WorkAccount) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    plan = planned(scheduler)
    encode(plan)
    spent = time.perf_counter() - start
    result = StepResult(plan.step, plan.decode, [[7, 8] for _ in plan.decode])
    start = time.perf_counter()
    deltas = scheduler.commit(result)
    account.add(*scheduler.committed_counts(), 0.05)
    encode(Outputs(deltas, scheduler.stats()))
    return spent + time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=256)
    sequences = parser.parse_args().sequences
    scheduler = ready(sequences)
    billed = account()
    times = [1e3 * step(scheduler, billed) for _ in range(300)]
    billed.totals()
    print(f"{sequences} sequences: {statistics.median(times):.3f} ms, least {min(times):.3f} ms")


if __name__ == "__main__":
    main()
