"""Qwen3.5 with a mixture of experts: the layers of dense Qwen3.5, every MLP made of experts and a
shared one, in the MTP head too."""

from __future__ import annotations

from dataclasses import replace

from millrace.model.build_context import BuildContext
from millrace.model.config import ModelConfig
from millrace.model.config_file import ConfigFile
from millrace.model.families import qwen3_5
from millrace.model.family import Family
from millrace.model.layers.decoder import Decoder
from millrace.model.layers.moe import MoE, unfused


def read(file: ConfigFile) -> ModelConfig:
    file.only("norm_topk_prob", True)
    file.only("decoder_sparse_step", 1)
    file.only("mlp_only_layers", [], None)
    shared = file.size("shared_expert_intermediate_size")
    experts = replace(file.experts(), shared_width=shared)
    return replace(qwen3_5.read_hybrid(file, mlp=False), experts=experts)


def build(context: BuildContext, max_len: int, mtp: bool) -> Decoder:
    """The model, with its draft head if `mtp`."""
    return qwen3_5.stack(context, max_len, mtp, MoE)


FAMILY = Family(
    name="Qwen3.5 MoE",
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    architectures=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    read=read,
    build=build,
    flat_name=qwen3_5.flat_name,
    parts=unfused,
    optional=("mtp.",),
)
