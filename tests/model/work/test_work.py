"""The work of a step against torch's own count of a model's FLOPs, and against published bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from millrace.errors import ConfigError
from millrace.model.build import count_weights
from millrace.model.config import ModelConfig
from millrace.model.work import (
    Formats,
    Layout,
    StepShape,
    experts_hit,
    formats_of,
    step_work,
    weight_bytes,
    weight_counts,
)
from millrace.plan.facts.models import catalogue, model_config

TINY = {
    "qwen3.5-27b": {"linear_num_value_heads": 4},
    "qwen3-32b": {},
    "qwen3.5-35b-a3b": {"linear_num_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2,
                        "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80},
    "qwen3-coder-30b-a3b": {"num_experts": 8, "num_experts_per_tok": 2,
                            "moe_intermediate_size": 48},
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip


def tiny(name: str, directory: Path) -> ModelConfig:
    from millrace.model.config import read_config

    entries = catalogue()[name] | SMALL | TINY[name] | {"dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(entries))
    return read_config(directory)


PLAIN = Formats(weights="fp32", plain="fp32", kv="fp32")


def oracle_flops(directory: Path, tokens: int) -> dict[str, float]:
    """FLOPs by op of a prompt of so many tokens in transformers, logits of all tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(directory),
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.arange(tokens)[None], use_cache=False)
    return {str(op): float(count) for op, count in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("name", sorted(TINY))
def test_flops_are_those_that_torch_counts(tmp_path: Path, name: str) -> None:
    """GEMMs exactly; attention exactly but for the masked half; the recurrence within 15%, whose
    inverse of a chunk can be written in several ways, and for whole chunks of 64 tokens."""
    tokens = 40
    config = tiny(name, tmp_path)
    counted = oracle_flops(tmp_path, tokens)
    parts = step_work(config, StepShape.of(prompts=1, length=tokens), PLAIN).parts
    gemms = parts["linear"].flops + parts["experts"].flops + tokens * parts["heads"].flops
    assert gemms == counted["aten.mm"]
    scores = parts["attention"].flops * 2 * tokens / (tokens + 1)
    recurrence = counted["aten.bmm"] - scores
    assert recurrence == pytest.approx(parts["recurrence"].flops * 64 / tokens, rel=0.15)


@pytest.mark.parametrize("name", sorted(TINY))
def test_weights_are_those_of_the_built_model(tmp_path: Path, name: str) -> None:
    """Norms, convolutions and decays are the difference."""
    config = tiny(name, tmp_path)
    experts = 0 if config.experts is None else config.experts.count
    counts = weight_counts(config)
    small = config.num_layers * (4 * config.hidden_size + 2 * config.head_dim)
    small += config.num_gdn_layers * (4 * config.conv_channels + 3 * config.value_heads)
    assert 0 <= count_weights(config) - counts.total(experts) <= small + config.hidden_size


def test_bytes_of_the_27b_are_those_of_its_checkpoint() -> None:
    config = model_config("Qwen/Qwen3.5-27B-FP8")
    found = weight_bytes(config, Formats(weights="fp8"), Layout(), drafts=True)
    assert found == pytest.approx(29.95e9, rel=0.002)  # text and draft head, as published
    shape = StepShape.of(rows=256, width=2, context=900)
    states = step_work(config, shape, Formats(weights="fp8", state="fp32")).parts["states"]
    assert states.read == pytest.approx(256 * 150_994_944, rel=0.1)  # and half-full windows
    per_token = step_work(config, shape, Formats(weights="fp8", window=0)).parts["states"]
    assert per_token.written == 2 * per_token.read  # one state for each of two tokens


def test_flops_of_a_token_of_the_27b() -> None:
    parts = step_work(
        model_config("qwen3.5-27b"), StepShape.of(rows=1, width=1, context=960), Formats()
    ).parts
    assert parts["linear"].flops == pytest.approx(48.70e9, rel=0.005)
    assert parts["heads"].flops == pytest.approx(2.54e9, rel=0.005)
    assert parts["kv"].flops == pytest.approx(0.38e9, rel=0.02)


def test_experts_that_no_token_goes_to_are_not_read() -> None:
    config = model_config("qwen3.5-35b-a3b")
    assert experts_hit(config, 1) == pytest.approx(8)
    assert 200 < experts_hit(config, 64) < 256
    one, many = (
        step_work(config, StepShape.of(rows=rows), Formats(weights="fp8")).parts["experts"]
        for rows in (1, 4096)
    )
    assert one.read / many.read == pytest.approx(8 / 256, rel=0.01)
    assert many.flops == pytest.approx(4096 * one.flops)


@pytest.mark.parametrize("experts", [False, True])
def test_ranks_share_what_is_split(experts: bool) -> None:
    config, shape = model_config("qwen3.5-35b-a3b"), StepShape.of(rows=64, width=2, context=900)
    one = step_work(config, shape, Formats(weights="fp8"), drafts=1).parts
    two = step_work(config, shape, Formats(weights="fp8"), Layout(2, experts), drafts=1).parts
    for name in ("experts", "states", "kv", "heads"):
        assert two[name].flops * 2 == pytest.approx(one[name].flops), name
        assert two[name].read * 2 == pytest.approx(one[name].read), name
    assert one["sums"].messages == 0
    assert two["sums"].messages == 2 * config.num_layers + 4
    assert two["sums"].message_bytes >= 2 * config.num_layers * 128 * 2 * config.hidden_size


def test_many_steps_at_once_are_the_same_as_one_by_one() -> None:
    config = model_config("qwen3.5-27b")
    rows, length = np.array([0.0, 1.0, 256.0]), np.array([0.0, 64.0, 700.0])
    shapes = StepShape.of(rows, 2, 900, prompts=1.0 * (length > 0), length=length)
    together = step_work(config, shapes, Formats(), drafts=1).flops
    alone = [
        step_work(
            config, StepShape.of(r, 2, 900, prompts=1.0 * (n > 0), length=n), Formats(), drafts=1
        ).flops
        for r, n in zip(rows, length, strict=True)
    ]
    assert together == pytest.approx(alone)
    assert together[0] == 0


def test_formats_follow_the_checkpoint(tmp_path: Path) -> None:
    assert formats_of(tiny("qwen3-32b", tmp_path)).weights == "fp32"
    with pytest.raises(ConfigError, match="weight format 'fp7' is unknown; fp32, bf16, fp8"):
        Formats(weights="fp7")
    with pytest.raises(ConfigError, match="cache dtype 'int3' is unknown"):
        Formats(kv="int3")
