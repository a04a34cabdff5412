"""What all-reduces of tensor-parallel ranks cost: every algorithm, and their share of a step.

The engine is built as for serving, with all its ranks. Then the all-reduces are measured at several
sizes, and decoding steps are timed at a few batch sizes.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import msgspec

from millrace.config import EngineArgs
from millrace.errors import ConfigError
from millrace.fleet.device_assignment import visible_gpus
from millrace.protocol import AddRequest, SamplingParams
from millrace.replica.build import Replica, build_engine

BATCHES = (1, 8, 32)
ROWS = [2**n for n in range(11)]  # tokens of the messages that are measured
_WARM, _STEPS = 8, 32


class StepCost(msgspec.Struct, frozen=True):
    """What all-reduces cost in decoding steps of one batch size. Times in microseconds."""

    batch: int
    step_us: float
    tokens_per_step: float  # of one request
    sums_per_step: int
    sums_per_token: float
    sum_us: float
    share: float  # of the step


def measure(args: EngineArgs) -> dict[str, Any]:
    """The report as data. Raises UserError when the engine cannot be started."""
    if args.tensor_parallel_size == 1:
        ranks = 2 if args.device == "cpu" else len(visible_gpus()) or 2
        if ranks == 1:
            raise ConfigError("--collectives needs 2 GPUs and 1 is visible; use --device cpu")
        args = msgspec.structs.replace(args, tensor_parallel_size=ranks)
    engine = build_engine(args)
    try:
        return measure_engine(engine)
    finally:
        engine.close()


def measure_engine(engine: Replica) -> dict[str, Any]:
    """The report on a running engine, as data."""
    import torch

    config, worker = engine.config, engine.worker
    assert config is not None
    seqs = engine.scheduler.limits.max_num_seqs
    batches = sorted({min(batch, seqs) for batch in BATCHES})
    costs = [_step_cost(engine, batch) for batch in batches]
    device = torch.cuda.get_device_name() if config.device == "cuda" else "cpu"
    return {
        "model": config.args.model,
        "tensor_parallel_size": worker.ranks.size,
        "device": device,
        "torch": str(torch.__version__),
        "drafts": config.drafts,
        "used": [_row(timing) for timing in worker.all_reduce.timings],
        "table": [_row(timing) for timing in worker.measure_all_reduce(ROWS)],
        "budget": [msgspec.to_builtins(cost) for cost in costs],
    }


def _row(timing: Any) -> dict[str, Any]:
    return dict(msgspec.to_builtins(timing))


def _step_cost(engine: Replica, batch: int) -> StepCost:
    """Time decoding steps of `batch` requests."""
    from millrace.runtime.ranks.allreduce import calls_per_step

    config, collectives = engine.config, engine.worker.all_reduce
    assert config is not None
    width = config.drafts + 1
    most = min((_WARM + _STEPS) * width, config.max_model_len - 8)
    params = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True)
    for number in range(batch):
        engine.add(AddRequest(f"doctor-{number}", [1 + number, 2, 3, 4], params))
    seconds, tokens_per_request = [], []
    while engine.has_work():
        began = time.perf_counter()
        deltas = engine.step()
        seconds.append(time.perf_counter() - began)
        tokens_per_request.append(sum(len(delta.token_ids) for delta in deltas) / batch)
    # The first steps contain the prompts, and the last ones have fewer requests.
    middle = slice(_WARM // 2, max(_WARM // 2 + 1, len(seconds) - _WARM // 2))
    step = statistics.median(seconds[middle]) * 1e6
    tokens = statistics.fmean(tokens_per_request[middle]) or 1.0
    sums = calls_per_step(engine.worker.model_config, config.speculation.head_drafts)
    cost = collectives.cost_us(batch * width)
    return StepCost(batch, step, tokens, sums, sums / tokens, cost, sums * cost / step)


def report(found: dict[str, Any]) -> str:
    """The report as text."""
    from millrace.runtime.ranks.allreduce import Timing, table

    timings = [msgspec.convert(row, Timing) for row in found["table"]]
    lines = [
        f"{found['tensor_parallel_size']} ranks of {found['model']} on {found['device']}, "
        f"torch {found['torch']}",
        "",
        table(timings),
        "",
        "| batch | step us | tokens a step | sums a step | sums a token | sum us | share |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found["budget"]:
        share = msgspec.convert(row, StepCost)
        lines.append(
            f"| {share.batch} | {share.step_us:,.0f} | {share.tokens_per_step:.2f} | "
            f"{share.sums_per_step} | {share.sums_per_token:.1f} | {share.sum_us:,.1f} | "
            f"{share.share:.1%} |"
        )
    if any(timing.normed_us is not None for timing in timings):
        lines += [
            "",
            "sum us: of the algorithm in use, with the residual add and norm after it",
        ]
    return "\n".join(lines)
