"""The config.json of a Qwen3.5-class dense model: read, checked, and the sizes that follow from it.

It needs no torch, so the scheduler can read it. It knows shapes and bytes, not weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from millrace.errors import CheckpointError
from millrace.kernels.formats import FP8_BLOCK, YarnScaling
from millrace.model.cache_spec import (
    CONV_KERNEL,
    CacheOptions,
    CacheSpec,
    LayerCache,
    attention_cache,
    gated_delta_cache,
    hidden_vector,
)

LayerType = Literal["full_attention", "linear_attention"]
SUPPORTED = (
    "supported are dense Qwen3.5-class models (model_type qwen3_5 or qwen3_5_text); "
    "--engine vllm serves others"
)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and constants of one dense model.

    layer_types: one entry for each decoder layer. dtype: of the checkpoint. fp8: linear layers are
    e4m3 with 128 x 128 block scales. nested: the text model is part of a larger checkpoint, whose
    tensors are named `model.language_model.*`.
    """

    hidden_size: int
    intermediate_size: int
    layer_types: tuple[LayerType, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rope_scaling: YarnScaling | None
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    vocab_size: int
    tied: bool
    eps: float
    max_positions: int
    eos_ids: tuple[int, ...]
    mtp_layers: int
    dtype: Literal["float32", "bfloat16"]
    fp8: bool
    nested: bool

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def num_attention_layers(self) -> int:
        return self.layer_types.count("full_attention")

    @property
    def num_gdn_layers(self) -> int:
        return self.layer_types.count("linear_attention")

    @property
    def conv_channels(self) -> int:
        """Channels of the short convolution, in the order queries, keys, values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    def kv_heads_on_rank(self, ranks: int) -> int:
        """KV heads of one rank. With more ranks than heads, several ranks have the same head."""
        return max(1, self.num_kv_heads // ranks)

    def cache_spec(self, options: CacheOptions) -> CacheSpec:
        """The memory of its layers."""

        def attention(name: str) -> LayerCache:
            return attention_cache(name, options, self.num_kv_heads, self.head_dim)

        heads = self.key_heads, self.value_heads, self.key_dim, self.value_dim
        layers = tuple(
            attention(f"layers.{i}")
            if kind == "full_attention"
            else gated_delta_cache(f"layers.{i}", options, *heads)
            for i, kind in enumerate(self.layer_types)
        )
        if not options.draft_head:
            return CacheSpec(options, layers)
        return CacheSpec(
            options, layers, attention("draft"), hidden_vector(options, self.hidden_size)
        )


# --- reading -----------------------------------------------------------------------------------


def read_config(
    directory: str | Path, overrides: Mapping[str, Any] = MappingProxyType({})
) -> ModelConfig:
    """The configuration of the checkpoint in `directory`. Raises CheckpointError if it cannot run.

    overrides: entries that replace those of config.json, objects entry by entry. Of a nested
    checkpoint they may name the text model's entries with or without `text_config`.
    EOS ids come from generation_config.json if it has some, else from config.json.
    """
    directory = Path(directory)
    outer = _overridden(_read_json(directory / "config.json"), overrides)
    nested = outer.get("model_type") == "qwen3_5" and "text_config" in outer
    text: dict[str, Any] = {**outer, **outer["text_config"]} if nested else outer
    text = _overridden(text, overrides)
    _check_class(outer, text)
    fields = _Fields(text, directory / "config.json")
    rotary_dim, theta, scaling = _rope(fields)
    return ModelConfig(
        hidden_size=fields.size("hidden_size"),
        intermediate_size=fields.size("intermediate_size"),
        layer_types=_layer_types(fields),
        num_heads=fields.size("num_attention_heads"),
        num_kv_heads=fields.size("num_key_value_heads"),
        head_dim=fields.size("head_dim", 256),
        rotary_dim=rotary_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        key_heads=fields.size("linear_num_key_heads"),
        value_heads=fields.size("linear_num_value_heads"),
        key_dim=fields.size("linear_key_head_dim", 128),
        value_dim=fields.size("linear_value_head_dim", 128),
        vocab_size=fields.size("vocab_size"),
        tied=bool(outer.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        eps=float(text.get("rms_norm_eps", 1e-6)),
        max_positions=fields.size("max_position_embeddings", 32768),
        eos_ids=_eos_ids(directory, outer, text),
        mtp_layers=int(text.get("mtp_num_hidden_layers") or 0),
        dtype=_dtype(outer, text),
        fp8=_is_fp8(outer, text),
        nested=nested,
    )


def _overridden(entries: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(entries)
    for name, value in overrides.items():
        old = found.get(name)
        objects = isinstance(old, dict) and isinstance(value, dict)
        found[name] = _overridden(old or {}, value) if objects else value
    return found


@dataclass(frozen=True, slots=True)
class _Fields:
    """The entries of the text config; every error names the file."""

    entries: dict[str, Any]
    path: Path

    def size(self, name: str, default: int | None = None) -> int:
        value = self.entries.get(name, default)
        if value is None:
            raise CheckpointError(f"{self.path}: {name} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.path}: {name} must be a whole number > 0, got {value!r}")
        return value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent} is not a directory; give one with a config.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; give a Hugging Face model directory") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def _check_class(outer: dict[str, Any], text: dict[str, Any]) -> None:
    """Raise CheckpointError for options that the model code does not implement."""
    kind = outer.get("model_type")
    if kind not in ("qwen3_5", "qwen3_5_text"):
        raise CheckpointError(f"model_type {kind!r} cannot be run; {SUPPORTED}")
    if text.get("num_experts"):
        raise CheckpointError(
            f"a model with {text['num_experts']} experts cannot be run; {SUPPORTED}"
        )
    for name, only in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("attn_output_gate", True),
        ("linear_conv_kernel_dim", CONV_KERNEL),
        ("mtp_use_dedicated_embeddings", False),
    ):
        if text.get(name, only) != only:
            raise CheckpointError(f"{name} {text[name]!r} cannot be run; only {only!r} can")
    if (text.get("mtp_num_hidden_layers") or 0) not in (0, 1):
        raise CheckpointError(
            f"mtp_num_hidden_layers {text['mtp_num_hidden_layers']!r} cannot be run; 0 and 1 can"
        )


def _layer_types(fields: _Fields) -> tuple[LayerType, ...]:
    count = fields.size("num_hidden_layers")
    listed = fields.entries.get("layer_types")
    if listed is None:
        interval = fields.size("full_attention_interval", 4)
        listed = [
            "linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)
        ]
    unknown = sorted(set(listed) - {"full_attention", "linear_attention"})
    if unknown or len(listed) != count:
        raise CheckpointError(
            f"{fields.path}: layer_types must name full_attention or linear_attention for each of "
            f"{count} layers, got {len(listed)} entries" + (f" with {unknown}" if unknown else "")
        )
    return tuple(listed)


def _rope(fields: _Fields) -> tuple[int, float, YarnScaling | None]:
    """(rotary_dim, theta, scaling) from rope_parameters, or from the older top-level entries."""
    entries = fields.entries
    rope = {**(entries.get("rope_scaling") or {}), **(entries.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", entries.get("rope_theta"))
    if theta is None:
        raise CheckpointError(f"{fields.path}: rope_parameters.rope_theta is missing")
    share = rope.get("partial_rotary_factor", entries.get("partial_rotary_factor", 0.25))
    rotary_dim = int(fields.size("head_dim", 256) * share)
    if rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(
            f"{fields.path}: partial_rotary_factor {share} turns {rotary_dim} dimensions of a "
            "head; an even number of at least 2 is needed"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise CheckpointError(f"rope_type {kind!r} cannot be run; default and yarn can")
    return rotary_dim, float(theta), _yarn(rope, fields) if kind == "yarn" else None


def _yarn(rope: dict[str, Any], fields: _Fields) -> YarnScaling:
    original = rope.get("original_max_position_embeddings")
    if original is None:
        raise CheckpointError(
            f"{fields.path}: rope_type yarn needs original_max_position_embeddings"
        )
    factor = rope.get("factor") or fields.size("max_position_embeddings", 32768) / original

    def attention(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    magnitude = rope.get("attention_factor")
    if magnitude is None:
        numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
        magnitude = attention(1.0)
        if numerator and denominator:
            magnitude = attention(numerator) / attention(denominator)
    return YarnScaling(
        factor=float(factor),
        original_max_positions=int(original),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        magnitude=float(magnitude),
        truncate=bool(rope.get("truncate", True)),
    )


def _eos_ids(directory: Path, outer: dict[str, Any], text: dict[str, Any]) -> tuple[int, ...]:
    path = directory / "generation_config.json"
    generation = _read_json(path) if path.exists() else {}
    for source in (generation, outer, text):
        found = source.get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return ()


def _dtype(outer: dict[str, Any], text: dict[str, Any]) -> Literal["float32", "bfloat16"]:
    """The checkpoint's dtype; float16 checkpoints run in bfloat16."""
    for source in (text, outer):
        name = source.get("dtype") or source.get("torch_dtype")
        if name is not None:
            return "float32" if name == "float32" else "bfloat16"
    return "bfloat16"


def _is_fp8(outer: dict[str, Any], text: dict[str, Any]) -> bool:
    found = outer.get("quantization_config") or text.get("quantization_config")
    if not found:
        return False
    method, block = found.get("quant_method"), found.get("weight_block_size")
    if method != "fp8" or list(block or []) != [FP8_BLOCK, FP8_BLOCK]:
        raise CheckpointError(
            f"quantization {method!r} with weight_block_size {block} cannot be run; "
            f"fp8 with [{FP8_BLOCK}, {FP8_BLOCK}] and unquantised checkpoints can"
        )
    return True
