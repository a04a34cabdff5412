"""The configuration of a model, whatever its family, and the sizes that follow from it.

It knows shapes, not weights. How a config.json is read is in `config_file.py` and in the families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from millrace.kernels.formats import YarnScaling
from millrace.model.cache_spec import (
    CacheOptions,
    CacheSpec,
    LayerCache,
    attention_cache,
    gated_delta_cache,
    hidden_vector,
)

if TYPE_CHECKING:
    from millrace.model.weight_format import Quantization

LayerType = Literal["full_attention", "linear_attention"]


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The mixture of experts that layers have in place of an MLP.

    count: of the experts; top_k: those that a token goes to. width: channels of one expert.
    normalize: whether the weights of a token's experts add up to 1. shared_width: channels of the
    expert that every token goes to; 0: there is none. dense_layers: layers with a plain MLP.
    """

    count: int
    top_k: int
    width: int
    normalize: bool
    shared_width: int = 0
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and constants of one model.

    family: its name in the registry. intermediate_size: channels of plain MLPs; 0 where there are
    none. layer_types: one entry for each decoder layer. rotary_dim: the
    first so many dimensions of a head are rotated. norm_offset: added to the weights of RMS norms
    when they are loaded. dtype: of what is not quantized. quantization: which linear layers are in
    which format. nested: the text model is part of a larger checkpoint, whose tensors are named
    `model.language_model.*`. mtp_layers: of the draft head in the checkpoint; 0: it has none.
    key_heads .. value_dim: of Gated DeltaNet layers; 0 where there are none. experts: None in
    dense models.
    """

    family: str
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[LayerType, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rope_scaling: YarnScaling | None
    vocab_size: int
    tied: bool
    eps: float
    max_positions: int
    eos_ids: tuple[int, ...]
    dtype: Literal["float32", "bfloat16"]
    quantization: Quantization
    nested: bool
    norm_offset: float = 0.0
    mtp_layers: int = 0
    key_heads: int = 0
    value_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    experts: ExpertsConfig | None = None

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

    @property
    def idle_weights(self) -> int:
        """Weights of experts that a token does not go to, draft head excluded."""
        found = self.experts
        if found is None:
            return 0
        layers = self.num_layers - len(found.dense_layers)
        return layers * (found.count - found.top_k) * 3 * found.width * self.hidden_size

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


def read_config(
    directory: str | Path, overrides: Mapping[str, Any] = MappingProxyType({})
) -> ModelConfig:
    """The configuration of the checkpoint in `directory`. Raises CheckpointError if it cannot run.

    overrides: entries that replace those of config.json, objects entry by entry. Of a nested
    checkpoint they may name the text model's entries with or without `text_config`.
    """
    from millrace.model.config_file import read_files  # with the families they import torch
    from millrace.model.registry import family_of, quantization_of
    from millrace.model.weights import tensor_names

    files = read_files(Path(directory), overrides)
    family = family_of(files.model_type, files.architectures)
    quantization = quantization_of(files.quantization_config).renamed(family.flat_name)
    if quantization.method != "none" and (names := tensor_names(Path(directory))):
        flat = (family.flat_name(name) for name in names)
        quantization = quantization.with_tensors(name for name in flat if name is not None)
    config = family.read(replace(files, quantization=quantization))
    return replace(config, family=family.name)
