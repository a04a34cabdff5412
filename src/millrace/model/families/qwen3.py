"""Dense Qwen3, 0.6B to 32B: attention with normed queries and keys, plain norms, no draft head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from millrace.model.build_context import BuildContext
from millrace.model.config import ModelConfig
from millrace.model.config_file import ConfigFile
from millrace.model.family import Family
from millrace.model.layers.attention import Attention, Rope
from millrace.model.layers.decoder import Decoder, DecoderLayer, FeedForward
from millrace.model.layers.mlp import MLP


def read(file: ConfigFile, *, mlp: bool = True) -> ModelConfig:
    """mlp: whether it has plain MLPs."""
    file.only("hidden_act", "silu")
    file.only("attention_bias", False)
    file.only("use_sliding_window", False)
    config = file.decoder(head_dim=128, mlp=mlp)
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
    return stack(context, max_len, lambda index, prefix: MLP(context, prefix))


def stack(context: BuildContext, max_len: int, mlp: Callable[[int, str], FeedForward]) -> Decoder:
    """The layers, each with the MLP that `mlp` makes for its number and prefix."""
    rope = Rope(context, max_len)

    def layer(index: int, prefix: str) -> DecoderLayer:
        attention = Attention(context, f"{prefix}.self_attn", rope)
        return DecoderLayer(context, prefix, attention, mlp(index, f"{prefix}.mlp"))

    count = context.config.num_layers
    return Decoder(context, [layer(i, f"model.layers.{i}") for i in range(count)])


FAMILY = Family(
    name="Qwen3 dense",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    read=read,
    build=build,
)
