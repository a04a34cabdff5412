"""What the work model must know of an engine to count its steps, and which devices they run on."""

from __future__ import annotations

from dataclasses import replace

import torch

from millrace.config import EngineConfig
from millrace.errors import ConfigError
from millrace.model.config import ModelConfig
from millrace.model.drafters.source import DraftSource
from millrace.model.work import Accounted, DraftModelWork, Eagle3Work, Formats, Layout
from millrace.model.work.fit import formats_in_memory

_CACHES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8"}


def accounted(
    config: EngineConfig, model: ModelConfig, layout: Layout, drafter: DraftSource | None
) -> Accounted | None:
    """The work of an engine's steps; None for weights in a format of unknown size."""
    try:
        formats = formats_of_engine(config, model)
        draft_model = None if drafter is None else _drafter_work(config, drafter, model)
    except ConfigError:
        return None
    # As the runner's eager steps do; a graph computes all tokens.
    eager = config.device == "cpu" or config.args.enforce_eager
    selects = eager and not config.speculation.head and model.layer_types[-1] == "full_attention"
    return Accounted(
        model, formats, layout, config.speculation.head_drafts, draft_model, selects=selects
    )


def formats_of_engine(config: EngineConfig, model: ModelConfig) -> Formats:
    """As its weights and caches are on its device. Raises ConfigError for an unknown format."""
    kept = model.quantization.format.is_fast_on(torch.device(config.device))
    found = formats_in_memory(model, config.dtype, kept)
    wanted = config.draft_fp8
    fp8_head = found.weights == "fp8" if wanted is None else wanted
    return replace(
        found,
        draft_head="fp8" if fp8_head else found.plain,
        kv=_CACHES[config.kv_dtype],
        state=_CACHES[config.state_dtype],
        window=config.window,
    )


def _drafter_work(
    config: EngineConfig, drafter: DraftSource, model: ModelConfig
) -> DraftModelWork | Eagle3Work:
    kept = drafter.config.quantization.format.is_fast_on(torch.device(config.device))
    formats = replace(
        formats_in_memory(drafter.config, config.dtype, kept), kv=_CACHES[config.kv_dtype]
    )
    if drafter.eagle is None:
        return DraftModelWork(drafter.config, formats)
    return Eagle3Work(drafter.config, formats, model.hidden_size, drafter.eagle.vocab_size)


def devices(device: torch.device, ranks: int) -> tuple[str, list[str]]:
    """The name of a device, and the UUIDs of its GPU and of those of the other ranks, which come
    behind it on this host; empty for a CPU."""
    if device.type != "cuda":
        return "", []
    first = torch.cuda.current_device()
    known = range(first, min(first + ranks, torch.cuda.device_count()))
    uuids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in known]
    return torch.cuda.get_device_name(first), uuids
