"""The first settings of a study, by the planner, in the terms of a search space."""

from __future__ import annotations

from collections.abc import Mapping

import click

from millrace.bench.load.options import BenchOptions
from millrace.errors import ConfigError, UserError
from millrace.hardware.gpus import gpu_of_device
from millrace.hardware.nvml import Nvml
from millrace.plan.facts.prices import price_of
from millrace.plan.predict.choice import Candidate, choose, label
from millrace.plan.predict.choice import Space as PlanSpace
from millrace.plan.predict.flags import KV, STATES
from millrace.plan.predict.load import Load
from millrace.plan.predict.prediction import Deployment, Planner
from millrace.tune.options import TuneFlags
from millrace.tune.search.proposals import Seed
from millrace.tune.space.knobs import Knob, Settings, Space, Value, copies_knob, key_of
from millrace.tune.workload import mean_lengths

_MOST = 4  # seeds
_PLANNED = ("millrace", "vllm", "sglang")


def seeds_of_planner(model: str, flags: TuneFlags, space: Space, load: BenchOptions) -> list[Seed]:
    """The planner's best settings, and the best of its others that differ, for the GPU that the
    flags name, or else the one of this host. Where nobody named it, a planner that does not know
    the model or the engine is no error; why there are no seeds is said."""
    gpu = flags.plan_gpu or (gpu_here() if not space.cores and flags.base_url is None else "")
    if not gpu:
        return []
    try:
        return _seeds_for(gpu, model, flags, space, load)
    except UserError as error:
        if flags.plan_gpu is not None:
            raise
        click.echo(f"no first settings by the planner: {error}", err=True)
        return []


def gpu_here() -> str:
    """The planner's name of this host's GPUs; empty where it knows none."""
    found = {gpu.name for device in Nvml().devices if (gpu := gpu_of_device(device.name))}
    return found.pop() if len(found) == 1 else ""


def _seeds_for(
    gpu: str, model: str, flags: TuneFlags, space: Space, load: BenchOptions
) -> list[Seed]:
    if flags.engine not in _PLANNED:
        raise ConfigError(f"--plan-gpu: the planner knows no engine {flags.engine}; leave it out")
    found = choose(
        Planner(),
        flags.plan_model or model,
        plan_load(flags, load),
        PlanSpace(gpus=[gpu], count=max(1, space.devices), engine=flags.engine),
    )
    seeds: dict[str, Seed] = {}
    for one in (found.best, *found.others):
        settings = space.normal(settings_of(one.prediction.deployment, space))
        if not space.problem(settings):
            seeds.setdefault(key_of(settings), _seed(one, settings))
        if len(seeds) == _MOST:
            break
    return list(seeds.values())


def _seed(one: Candidate, settings: Settings) -> Seed:
    tokens = one.prediction.bars["total_tokens"].value
    why = f"{label(one.prediction.deployment)}: {tokens:,.0f} tok/s are predicted"
    return Seed(settings=settings, source="planner", why=why)


def plan_load(flags: TuneFlags, load: BenchOptions) -> Load:
    """The load in the planner's terms."""
    mean_input, mean_output = mean_lengths(load)
    open_loop = load.schedule.open_loop
    return Load(
        input=mean_input,
        output=max(1.0, mean_output),
        concurrency=0.0 if open_loop else float(load.max_concurrency or 1),
        rate=load.schedule.rate if open_loop else 0.0,
        text=flags.plan_text,
    )


def settings_of(deployment: Deployment, space: Space) -> Settings:
    """A planned deployment as settings; values that a knob does not have become the nearest."""
    d, settings = deployment.description, deployment.settings
    planned: Mapping[str, Value] = {
        "tensor_parallel_size": d.tensor,
        copies_knob(space): deployment.replicas,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "mixed_prefill_tokens": settings.mixed or None,
        "kv_cache_dtype": KV[d.kv],
        "mamba_ssm_cache_dtype": STATES[d.state],
        "drafts": d.drafts,
        "gpu_memory_utilization": deployment.utilization,
    }
    return {
        name: nearest(space[name], value)
        for name, value in planned.items()
        if name in space and value is not None
    }


def nearest(knob: Knob, value: Value) -> Value:
    """The value of a knob that is nearest to a number; the default for an unknown text."""
    if value in knob.values:
        return value
    numbers = [v for v in knob.values if isinstance(v, int | float) and not isinstance(v, bool)]
    if isinstance(value, int | float) and numbers:
        return min(numbers, key=lambda one: abs(one - value))
    return knob.default


def price_of_gpu(name: str | None) -> float:
    """Dollars a GPU-hour by the table; 1 where no GPU is named."""
    return 1.0 if name is None else price_of(name).dollars
