"""The shapes of published models as directories from which engines can be built, and their work.

Only config.json is written; the weights are random with a seed (`load_format="dummy"`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from millrace.model.config import ModelConfig, read_config
from millrace.model.work import Formats, StepShape, Work, formats_of, step_work
from millrace.plan.facts.models import catalogue

# Rates of one H200, as measured: bytes/s of a copy, and FLOP/s.
COPY, RATES = 4.27e12, {"fp8": 1300e12, "bf16": 790e12}
ROUTER_SPREAD = 0.25  # deviation of the logarithms of lengths of a router's rows
FP8_BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
# 4 bits in groups of 128, symmetric, as most checkpoints of this class are.
INT4_GROUPS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                "group_size": 128,
            },
        }
    },
    "ignore": ["lm_head"],
}  # fmt: skip
QUANTIZATIONS: dict[str, dict[str, Any]] = {"fp8": FP8_BLOCKS, "int4": INT4_GROUPS}
SHAPES = catalogue()


def write_config(
    directory: Path,
    layers: int | None = None,
    name: str = "qwen3.5-27b",
    quantization: str = "fp8",
) -> Path:
    """The config.json of a model of SHAPES with quantized weights. layers: None: all. Returns the
    directory."""
    config = SHAPES[name] | {"quantization_config": QUANTIZATIONS[quantization]}
    if layers is not None:
        config["num_hidden_layers"] = layers
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


def floor_seconds(work: Work) -> dict[str, float]:
    """Seconds that each part of a step takes at best on one H200, and their sum."""
    found = {
        name: max(part.flops / RATES[part.unit], part.bytes / COPY)
        for name, part in work.parts.items()
        if part.flops or part.bytes
    }
    return {**found, "all": sum(found.values())}


def read_sizes(directory: Path) -> ModelConfig:
    return read_config(directory)


def decode_work(c: ModelConfig, rows: int, width: int, context: float) -> Work:
    """A step of `rows` decoding rows of `width` tokens, of `context` tokens each: FP8 keys, float32
    states."""
    return step_work(
        c,
        StepShape.of(rows, width, context),
        formats(c),
        drafts=width - 1,
        router_spread=ROUTER_SPREAD,
    )


def formats(c: ModelConfig) -> Formats:
    """Of the engine's defaults for benchmarks; drafts have an FP8 head where weights are FP8."""
    return formats_of(c, kv="fp8", draft_head="fp8" if c.quantization.method == "fp8" else "bf16")


def prefill_work(c: ModelConfig, prompts: int, length: int) -> Work:
    """Whole prompts of `length` tokens, without drafts."""
    shape = StepShape.of(prompts=prompts, length=length)
    return step_work(c, shape, formats(c), router_spread=ROUTER_SPREAD)
