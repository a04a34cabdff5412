"""Dense Qwen3.5: Gated DeltaNet and gated attention, norms of 1 + weight, an MTP head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from millrace.errors import CheckpointError
from millrace.model.build_context import BuildContext
from millrace.model.cache_spec import CONV_KERNEL
from millrace.model.config import ModelConfig
from millrace.model.config_file import ConfigFile
from millrace.model.drafters.mtp import MTPHead
from millrace.model.family import Family
from millrace.model.layers.attention import Attention, Rope
from millrace.model.layers.decoder import Decoder, DecoderLayer, FeedForward, Mixer
from millrace.model.layers.gated_deltanet import GatedDeltaNet
from millrace.model.layers.mlp import MLP


def read(file: ConfigFile) -> ModelConfig:
    if experts := file.text.get("num_experts"):
        raise CheckpointError(
            f"a {file.model_type} with {experts} experts cannot be run; dense ones can, and "
            "qwen3_5_moe; --engine vllm serves others"
        )
    return read_hybrid(file, mlp=True)


def read_hybrid(file: ConfigFile, *, mlp: bool) -> ModelConfig:
    """The text model; mlp: whether it has plain MLPs. Of interleaved mrope, all three rows have
    equal positions for text: it is plain RoPE."""
    file.only("hidden_act", "silu")
    file.only("attention_bias", False)
    file.only("attn_output_gate", True)
    file.only("linear_conv_kernel_dim", CONV_KERNEL)
    file.only("mtp_use_dedicated_embeddings", False)
    file.only("mtp_num_hidden_layers", 0, 1, None)
    interval = file.size("full_attention_interval", 4)
    return replace(
        file.decoder(head_dim=256, rotary_share=0.25, mlp=mlp),
        layer_types=file.layer_types("linear_attention", "full_attention", interval=interval),
        norm_offset=1.0,
        mtp_layers=file.text.get("mtp_num_hidden_layers") or 0,
        key_heads=file.size("linear_num_key_heads"),
        value_heads=file.size("linear_num_value_heads"),
        key_dim=file.size("linear_key_head_dim", 128),
        value_dim=file.size("linear_value_head_dim", 128),
    )


def build(context: BuildContext, max_len: int, mtp: bool) -> Decoder:
    """The model, with its draft head if `mtp`."""
    return stack(context, max_len, mtp, MLP)


def stack(
    context: BuildContext,
    max_len: int,
    mtp: bool,
    mlp: Callable[[BuildContext, str], FeedForward],
    recurrent: Callable[[BuildContext, str], Mixer] = GatedDeltaNet,
) -> Decoder:
    """The layers, each with the MLP that `mlp` makes for its prefix, and attention or the mixer
    that `recurrent` makes."""
    rope = Rope(context, max_len)

    def layer(prefix: str, kind: str, first: int = 0) -> DecoderLayer:
        feed_forward = mlp(context, f"{prefix}.mlp")
        if kind == "linear_attention":
            mixer = recurrent(context, f"{prefix}.linear_attn")
            return DecoderLayer(context, prefix, mixer, feed_forward)
        attention = Attention(context, f"{prefix}.self_attn", rope, gated=True, first=first)
        return DecoderLayer(context, prefix, attention, feed_forward)

    kinds = enumerate(context.config.layer_types)
    model = Decoder(context, [layer(f"model.layers.{i}", kind) for i, kind in kinds])
    if mtp:
        head = layer("mtp.layers.0", "full_attention", first=1)
        model.mtp = MTPHead(context, model.embedding, head)
    return model


def flat_name(name: str) -> str | None:
    """Checkpoints with a vision part have nested names; the vision part is not used."""
    if name.startswith("model.visual."):
        return None
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name


FAMILY = Family(
    name="Qwen3.5 dense",
    model_types=("qwen3_5", "qwen3_5_text"),
    architectures=("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    read=read,
    build=build,
    flat_name=flat_name,
    optional=("mtp.",),
)
