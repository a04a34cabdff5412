"""Qwen3-Next: the layers of Qwen3.5 with a mixture of experts, whose recurrent layers have their
projections in two tensors."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from millrace.model.build_context import BuildContext
from millrace.model.config import ModelConfig
from millrace.model.config_file import ConfigFile
from millrace.model.families import qwen3_5, qwen3_5_moe
from millrace.model.family import Family
from millrace.model.layers.decoder import Decoder
from millrace.model.layers.gated_deltanet import GatedDeltaNet
from millrace.model.layers.moe import MoE, unfused


def read(file: ConfigFile) -> ModelConfig:
    """Published files do not say that there is one MTP layer, which the checkpoints have."""
    config = qwen3_5_moe.read(file)
    return config if "mtp_num_hidden_layers" in file.text else replace(config, mtp_layers=1)


def build(context: BuildContext, max_len: int, mtp: bool) -> Decoder:
    """The model, with its draft head if `mtp`."""
    recurrent = partial(GatedDeltaNet, by_head=True)
    return qwen3_5.stack(context, max_len, mtp, MoE, recurrent)


FAMILY = Family(
    name="Qwen3-Next",
    model_types=("qwen3_next",),
    architectures=("Qwen3NextForCausalLM",),
    read=read,
    build=build,
    parts=unfused,
    optional=("mtp.",),
)
