"""Small fleets for tests: a linear step model, and a load of random prompts."""

from __future__ import annotations

from typing import Any

import msgspec

from millrace.bench.load.arrivals import Schedule
from millrace.bench.load.options import BenchOptions
from millrace.bench.workload.prompts import RandomSpec, Workload
from millrace.model.work import StepShape
from millrace.plan.model.step_model import StepTimes
from millrace.protocol import Limits
from millrace.simulate.common.lifecycle import LifeOptions
from millrace.simulate.common.options import (
    ApiServerCost,
    GatewayOptions,
    ReplicaKind,
    Scenario,
    Speeds,
)
from millrace.target import Target


class LinearSteps:
    """Seconds: a constant, and so much for each decode row and each prompt token."""

    def __init__(
        self, base: float = 0.010, row: float = 1e-4, token: float = 1e-5, context: float = 0.0
    ) -> None:
        self._base, self._row, self._token, self._context = base, row, token, context

    def times(self, shape: StepShape) -> StepTimes:
        rows = self._row * shape.decode_rows + self._context * shape.decode_context
        return StepTimes(0.0, self._base + rows + self._token * shape.prompt_tokens)


LIMITS = Limits(
    max_num_seqs=16,
    max_num_batched_tokens=512,
    max_model_len=512,
    page_size=16,
    num_pages=16 * 32 + 1,
    num_snapshots=16,
    drafts=0,
    mixed_prefill_tokens=256,
    long_prefill_token_threshold=256,
    max_long_partial_prefills=1,
    eos_ids=frozenset({0}),
)


def load(
    count: int = 40, *, concurrency: int | None = None, rate: float = float("inf"), **changes: Any
) -> BenchOptions:
    """Random prompts, closed loop by concurrency or open loop by rate; changes: of RandomSpec."""
    seed = changes.get("seed", 0)
    spec = RandomSpec(
        **{"input_len": 100, "output_len": 30, "range_ratio": 0.5, **changes}, count=count
    )
    return loaded(spec, concurrency=concurrency, schedule=Schedule(rate=rate, seed=seed))


def loaded(
    spec: Workload, *, concurrency: int | None = None, schedule: Schedule | None = None
) -> BenchOptions:
    return BenchOptions(
        target=Target("simulated", 80),
        workload=spec,
        schedule=schedule or Schedule(),
        max_concurrency=concurrency,
    )


def scenario(given: BenchOptions, replicas: int = 2, **changes: Any) -> Scenario:
    """changes: limits, acceptance, jitter, policy, life (fields of LifeOptions), depth, model,
    seed, gateway, check."""
    limits = msgspec.structs.replace(LIMITS, **changes.get("limits", {}))
    seed = changes.get("seed", 0)
    speeds = Speeds(acceptance=changes.get("acceptance", ()), jitter=changes.get("jitter", 0.0))
    if changes.get("acceptance"):
        limits = msgspec.structs.replace(limits, drafts=len(changes["acceptance"]))
    return Scenario(
        load=given,
        kind=ReplicaKind(
            limits=limits,
            model=changes.get("model", LinearSteps()),
            speeds=speeds,
            api_server=ApiServerCost(5e-4, 2e-5),
            depth=changes.get("depth", 1),
        ),
        gateway=GatewayOptions(
            policy=changes.get("policy", "least_loaded"),
            chunk_seconds=2e-5,
            seed=seed,
            **changes.get("gateway", {}),
        ),
        life=LifeOptions(replicas=replicas, seed=seed, **changes.get("life", {})),
        seed=seed,
        check=changes.get("check", False),
    )
