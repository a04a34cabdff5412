"""How many weights a model has, part by part, and how many of them a step reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import exp
from statistics import NormalDist
from typing import Any

from millrace.model.config import ModelConfig
from millrace.model.work.layout import WEIGHT_BYTES, Formats, Layout


@dataclass(frozen=True, slots=True)
class WeightCounts:
    """Weights of a whole model by part.

    recurrent, attention: mixers of all layers, without MLPs. plain: of layers, but never quantized:
    gates of recurrent layers, routers. mlp: plain MLPs and shared experts. expert: one expert of
    one layer. head: the output head. draft_mixer, draft_mlp, draft_join: of the draft head, whose
    experts are as those of layers; draft_join: the 16-bit layer that joins embedding and hidden.
    """

    recurrent: float
    attention: float
    plain: float
    mlp: float
    expert: float
    moe_layers: int
    head: float
    embedding: float
    draft_mixer: float = 0.0
    draft_mlp: float = 0.0
    draft_join: float = 0.0

    def total(self, experts: int) -> float:
        """Of the model without its draft head; norms and convolutions are left out."""
        layers = self.recurrent + self.attention + self.plain + self.mlp
        return layers + self.moe_layers * experts * self.expert + self.head + self.embedding


def weight_counts(config: ModelConfig) -> WeightCounts:
    """Weights of a model by part."""
    h, values = config.hidden_size, config.value_heads * config.value_dim
    recurrent = h * (config.conv_channels + values) + values * h
    attention = _attention_weights(config)
    experts, layers = config.experts, config.num_layers
    dense = layers if experts is None else len(experts.dense_layers)
    moe = layers - dense
    mlp, expert, plain = dense * 3.0 * h * config.intermediate_size, 0.0, 0.0
    draft_mlp = 3.0 * h * config.intermediate_size
    if experts is not None:
        expert = 3.0 * h * experts.width
        shared = 3.0 * h * experts.shared_width
        mlp, draft_mlp = mlp + moe * shared, shared
        plain = moe * h * (experts.count + bool(experts.shared_width))
    gates = 2.0 * h * config.value_heads * config.num_gdn_layers
    mtp = config.mtp_layers > 0
    head = float(h * config.vocab_size)
    return WeightCounts(
        recurrent=float(config.num_gdn_layers * recurrent),
        attention=config.num_attention_layers * attention,
        plain=plain + gates,
        mlp=mlp,
        expert=expert,
        moe_layers=moe,
        head=head,
        embedding=0.0 if config.tied else head,
        draft_mixer=attention if mtp else 0.0,
        draft_mlp=draft_mlp if mtp else 0.0,
        draft_join=2.0 * h * h if mtp else 0.0,
    )


def _attention_weights(config: ModelConfig) -> float:
    """Of one layer. Hybrid models have output gates, which come with the queries."""
    queries = 2 if config.num_gdn_layers else 1
    heads = queries * config.num_heads + 2 * config.num_kv_heads
    inner = config.num_heads * config.head_dim
    return float(config.hidden_size * (heads * config.head_dim + inner))


def experts_hit(config: ModelConfig, tokens: Any, router_spread: float = 0.0) -> Any:
    """Experts of a layer that get one of so many tokens. router_spread: as in `expert_shares`."""
    assert config.experts is not None
    count, top_k = config.experts.count, config.experts.top_k
    if not router_spread:
        return count * (1 - (1 - top_k / count) ** tokens)
    return sum(1 - (1 - share) ** tokens for share in expert_shares(count, top_k, router_spread))


@functools.cache
def expert_shares(count: int, top_k: int, router_spread: float) -> tuple[float, ...]:
    """The share of tokens that each expert of a layer gets, the busiest last.

    Rows of the router have lengths exp(router_spread * normal), so the logits of an expert are
    normal with that deviation; an expert gets a token if its logit exceeds a threshold, at which
    `top_k` of them do on average.
    """
    normal = NormalDist()
    scales = [exp(router_spread * normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        found = sum(1 - normal.cdf(middle / scale) for scale in scales)
        low, high = (middle, high) if found > top_k else (low, middle)
    return tuple(1 - normal.cdf(low / scale) for scale in scales)


def weight_bytes(
    config: ModelConfig, formats: Formats, layout: Layout, *, drafts: bool = False
) -> float:
    """Bytes of the weights on one rank; embeddings, which are looked up, are whole on each."""
    counts, experts = weight_counts(config), 0 if config.experts is None else config.experts.count
    each, plain = WEIGHT_BYTES[formats.weights], WEIGHT_BYTES[formats.plain]
    linear = counts.recurrent + counts.attention + counts.mlp
    linear += counts.moe_layers * experts * counts.expert
    found = (linear * each + counts.head * plain) / layout.tensor + counts.plain * plain
    found += counts.embedding * plain / layout.tensor
    if drafts and config.mtp_layers:
        layer = counts.draft_mixer + counts.draft_mlp + experts * counts.expert
        found += layer * each / layout.tensor + counts.draft_join * plain
        if formats.draft_head != formats.plain:
            found += counts.head * WEIGHT_BYTES[formats.draft_head] / layout.tensor
    return found
