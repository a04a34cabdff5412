"""Qwen3 with a mixture of experts, as Qwen3-Coder-30B-A3B: the attention of dense Qwen3, no draft
head, no shared expert."""

from __future__ import annotations

from dataclasses import replace

from millrace.errors import CheckpointError
from millrace.model.build_context import BuildContext
from millrace.model.config import ModelConfig
from millrace.model.config_file import ConfigFile
from millrace.model.families import qwen3
from millrace.model.family import Family
from millrace.model.layers.decoder import Decoder, FeedForward
from millrace.model.layers.mlp import MLP
from millrace.model.layers.moe import MoE, unfused


def read(file: ConfigFile) -> ModelConfig:
    """Layers of `mlp_only_layers`, and those that `decoder_sparse_step` leaves out, are dense."""
    step, count = file.size("decoder_sparse_step", 1), file.size("num_hidden_layers")
    listed = file.text.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(i in range(count) for i in listed):
        raise CheckpointError(
            f"{file.path}: mlp_only_layers must list layers from 0 to {count - 1}, got {listed!r}"
        )
    dense = tuple(i for i in range(count) if i in listed or (i + 1) % step)
    normalize = bool(file.text.get("norm_topk_prob", False))
    experts = replace(file.experts(), normalize=normalize, dense_layers=dense)
    return replace(qwen3.read(file, mlp=bool(dense)), experts=experts)


def build(context: BuildContext, max_len: int, mtp: bool) -> Decoder:
    experts = context.config.experts
    assert experts is not None

    def mlp(index: int, prefix: str) -> FeedForward:
        return (MLP if index in experts.dense_layers else MoE)(context, prefix)

    return qwen3.stack(context, max_len, mlp)


FAMILY = Family(
    name="Qwen3 MoE",
    model_types=("qwen3_moe",),
    architectures=("Qwen3MoeForCausalLM",),
    read=read,
    build=build,
    parts=unfused,
)
