"""Dense Qwen3, 0.6B to 32B: attention with normed queries and keys, plain norms, no draft head."""

from __future__ import annotations

from dataclasses import replace

from millrace.model.build_context import BuildContext
from millrace.model.config import ModelConfig
from millrace.model.config_file import ConfigFile
from millrace.model.family import Family
from millrace.model.layers.attention import Attention, Rope
from millrace.model.layers.decoder import Decoder, DecoderLayer
from millrace.model.layers.mlp import MLP


def read(file: ConfigFile) -> ModelConfig:
    file.only("hidden_act", "silu")
    file.only("attention_bias", False)
    file.only("use_sliding_window", False)
    config = file.decoder(head_dim=128)
    if config.rope_scaling is None:
        longest = config.max_positions
    else:  # Qwen3's config.json keeps the original length there
        scaling = config.rope_scaling
        longest = int(scaling.factor * scaling.original_max_positions)
    return replace(
        config,
        layer_types=file.layer_types("full_attention"),
        max_positions=max(longest, config.max_positions),
    )


def build(context: BuildContext, max_len: int, mtp: bool) -> Decoder:
    rope = Rope(context, max_len)

    def layer(prefix: str) -> DecoderLayer:
        attention = Attention(context, f"{prefix}.self_attn", rope)
        return DecoderLayer(context, prefix, attention, MLP(context, f"{prefix}.mlp"))

    count = context.config.num_layers
    return Decoder(context, [layer(f"model.layers.{i}") for i in range(count)])


FAMILY = Family(
    name="Qwen3 dense",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    read=read,
    build=build,
)
