"""The work of one step on one rank, part by part: FLOPs, bytes and messages.

Bytes are those that must go through the memory of the device at least once: weights that are read,
caches, and activations between kernels. A multiply and an add are two FLOPs. Functions take floats
or numpy arrays, as StepShape has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from millrace.model.config import ModelConfig
from millrace.model.work.layout import CACHE_BYTES, COMPUTE, WEIGHT_BYTES, Formats, Layout
from millrace.model.work.shape import StepShape
from millrace.model.work.weights import WeightCounts, experts_hit, weight_counts

CHUNK = 64  # tokens that the recurrence of prompts treats at once


@dataclass(frozen=True, slots=True)
class Part:
    """Work of one kind. unit: what computes it: fp4, fp8, bf16 or fp32. read, written: bytes.
    messages, message_bytes: sums over the ranks, and the bytes of all of them."""

    flops: Any = 0.0
    unit: str = "bf16"
    read: Any = 0.0
    written: Any = 0.0
    messages: Any = 0.0
    message_bytes: Any = 0.0

    @property
    def bytes(self) -> Any:
        return self.read + self.written


@dataclass(frozen=True, slots=True)
class Work:
    """What a step must compute and move, by part."""

    parts: dict[str, Part]

    @property
    def flops(self) -> Any:
        return sum(part.flops for part in self.parts.values())

    @property
    def bytes(self) -> Any:
        return sum(part.bytes for part in self.parts.values())


def step_work(
    config: ModelConfig,
    shape: StepShape,
    formats: Formats,
    layout: Layout = Layout(),  # noqa: B008, frozen
    drafts: int = 0,
    router_spread: float = 0.0,
) -> Work:
    """The work of a step on one rank. drafts: tokens drafted for each sampled row. router_spread:
    how unevenly tokens go to experts, as in `expert_shares`; 0: evenly.

    linear, experts, draft_layer, heads: GEMMs. states: recurrence of decode rows. recurrence: of
    prompts. kv: attention of decode rows. attention: of prompts. pointwise: norms, gates,
    convolutions, activations. sampling. sums: over the ranks.
    """
    counts = weight_counts(config)
    drafts = drafts if config.mtp_layers else 0
    return Work(
        {
            "linear": _linear(config, counts, shape, formats, layout),
            "experts": _experts(config, counts, shape, formats, layout, router_spread),
            "draft_layer": _draft_layer(config, counts, shape, formats, layout, drafts),
            "heads": _heads(config, counts, shape, formats, layout, drafts),
            "states": _states(config, shape, formats, layout),
            "recurrence": _recurrence(config, shape, formats, layout),
            "kv": _kv(config, shape, formats, layout, drafts),
            "attention": _attention(config, shape, formats, layout),
            "pointwise": _pointwise(config, shape, formats, layout),
            "sampling": Part(read=4.0 * config.vocab_size * shape.scored_tokens / layout.tensor),
            "sums": _sums(config, shape, layout, drafts),
        }
    )


def _linear(
    c: ModelConfig, counts: WeightCounts, shape: StepShape, formats: Formats, layout: Layout
) -> Part:
    weights = counts.recurrent + counts.attention + counts.mlp
    stored = weights * WEIGHT_BYTES[formats.weights] / layout.tensor
    stored += counts.plain * WEIGHT_BYTES[formats.plain]
    some = shape.tokens > 0
    inner = weights / c.hidden_size  # inputs and outputs of all layers, but the hidden vectors
    moved = (4.0 * c.hidden_size * c.num_layers + inner / layout.tensor) * shape.tokens
    flops = 2.0 * (weights / layout.tensor + counts.plain) * shape.tokens
    return Part(flops, formats.compute, stored * some, moved)


def _experts(
    c: ModelConfig,
    counts: WeightCounts,
    shape: StepShape,
    formats: Formats,
    layout: Layout,
    router_spread: float,
) -> Part:
    """Experts that no token goes to are not read. Ranks are taken to have equal shares."""
    if c.experts is None:
        return Part(unit=formats.compute)
    used = c.experts.top_k * counts.expert * counts.moe_layers / layout.tensor
    hit = (
        experts_hit(c, shape.tokens, router_spread)
        * counts.expert
        * counts.moe_layers
        / layout.tensor
    )
    moved = c.experts.top_k * (4.0 * c.hidden_size + 3.0 * c.experts.width) * counts.moe_layers
    return Part(
        2.0 * used * shape.tokens,
        formats.compute,
        hit * WEIGHT_BYTES[formats.weights],
        moved * shape.tokens / layout.tensor,
    )


def _draft_layer(
    c: ModelConfig,
    counts: WeightCounts,
    shape: StepShape,
    formats: Formats,
    layout: Layout,
    drafts: int,
) -> Part:
    """The first draft joins every token to the hidden vectors and keeps keys and values of all; the
    rest of the layer runs for one token a row and draft."""
    if not drafts:
        return Part(unit=formats.compute)
    rows, h = shape.sampled_rows, c.hidden_size
    keys = 2.0 * h * c.num_kv_heads * c.head_dim
    layer = counts.draft_mixer + counts.draft_mlp
    hit: Any = 0.0
    if c.experts is not None:
        layer += c.experts.top_k * counts.expert
        hit = (experts_hit(c, rows) - c.experts.top_k) * counts.expert
    passes = drafts * (rows > 0)
    stored = ((layer + hit) * WEIGHT_BYTES[formats.weights]) / layout.tensor
    stored = (stored + counts.draft_join * WEIGHT_BYTES[formats.plain]) * passes
    flops = 2.0 * drafts * rows * (layer / layout.tensor + counts.draft_join)
    flops += 2.0 * shape.tokens * (keys / layout.tensor + counts.draft_join)
    return Part(flops, formats.compute, stored, 8.0 * h * (shape.tokens + drafts * rows))


def _heads(
    c: ModelConfig,
    counts: WeightCounts,
    shape: StepShape,
    formats: Formats,
    layout: Layout,
    drafts: int,
) -> Part:
    """The output head for what is scored, and for each draft."""
    rows, some = shape.sampled_rows, shape.sampled_rows > 0
    head = counts.head / layout.tensor
    stored = head * WEIGHT_BYTES[formats.plain] + drafts * head * WEIGHT_BYTES[formats.draft_head]
    flops = 2.0 * head * (shape.scored_tokens + rows * drafts)
    logits = 4.0 * c.vocab_size / layout.tensor * (shape.scored_tokens + rows * drafts)
    return Part(flops, COMPUTE[formats.plain], stored * some, logits)


def _states(c: ModelConfig, shape: StepShape, formats: Formats, layout: Layout) -> Part:
    """In the window form a state is read once, and written when its window is full; else it is
    written after every token, so that drafts can be taken back."""
    rows, tokens = shape.decode_rows, shape.decode_tokens
    state = c.value_heads * c.key_dim * c.value_dim / layout.tensor
    flops = 8.0 * state * tokens * c.num_gdn_layers
    size = state * CACHE_BYTES[formats.state] * c.num_gdn_layers
    if not formats.window:
        return Part(flops, "bf16", size * rows, size * tokens)
    width = tokens / (rows + (rows == 0))
    folds = rows * width / _at_least_one(formats.window - width)
    row = (c.key_heads * c.key_dim + c.value_heads * c.value_dim) * 4.0 * c.num_gdn_layers
    recent = rows * row * formats.window / 2 / layout.tensor
    return Part(flops, "bf16", size * rows + recent, size * folds + row * tokens / layout.tensor)


def _at_least_one(count: Any) -> Any:
    return count * (count > 1) + (count <= 1)


def _recurrence(c: ModelConfig, shape: StepShape, formats: Formats, layout: Layout) -> Part:
    """Prompts in chunks: products with the state, and within a chunk."""
    if not c.num_gdn_layers:
        return Part()
    heads = c.value_heads * c.num_gdn_layers / layout.tensor
    inside = CHUNK * (2.0 * c.key_dim + 2.0 * c.value_dim + CHUNK / 3)
    flops = heads * (6.0 * c.key_dim * c.value_dim + inside) * shape.prompt_tokens
    channels = (c.conv_channels + 2.0 * c.value_heads * c.value_dim) * c.num_gdn_layers
    state = 2.0 * heads * c.key_dim * c.value_dim * CACHE_BYTES[formats.state]
    return Part(
        flops, "bf16", 2.0 * channels * shape.prompt_tokens / layout.tensor, state * shape.prompts
    )


def _kv_bytes(c: ModelConfig, formats: Formats, layout: Layout) -> float:
    """Keys and values of one token in one layer, on one rank."""
    return 2.0 * c.kv_heads_on_rank(layout.tensor) * c.head_dim * CACHE_BYTES[formats.kv]


def _kv(c: ModelConfig, shape: StepShape, formats: Formats, layout: Layout, drafts: int) -> Part:
    """A draft reads the keys of its row in the draft head's layer."""
    layers, heads = c.num_attention_layers, c.num_heads / layout.tensor
    width = shape.decode_tokens / (shape.decode_rows + (shape.decode_rows == 0))
    read = shape.decode_context * (layers + drafts)
    flops = 4.0 * heads * c.head_dim * shape.decode_context * (layers * width + drafts)
    each = _kv_bytes(c, formats, layout)
    return Part(flops, "bf16", read * each, shape.decode_tokens * layers * each)


def _attention(c: ModelConfig, shape: StepShape, formats: Formats, layout: Layout) -> Part:
    """Attention of prompts; keys of earlier pieces are read once."""
    layers, heads = c.num_attention_layers, c.num_heads / layout.tensor
    flops = 4.0 * heads * c.head_dim * layers * shape.prompt_attention
    each = _kv_bytes(c, formats, layout) * layers
    read = each * (shape.prompt_context + shape.prompt_tokens)
    return Part(flops, "bf16", read, each * shape.prompt_tokens)


def _pointwise(c: ModelConfig, shape: StepShape, formats: Formats, layout: Layout) -> Part:
    """Two norms with their residuals, the activation of the MLP, gates, the short convolution."""
    out = 1.0 if formats.compute == "fp8" else 2.0
    norms = 2.0 * c.num_layers * c.hidden_size * (6.0 + out)
    experts = c.experts
    inner = float(c.intermediate_size * c.num_layers)
    if experts is not None:
        dense = len(experts.dense_layers)
        inner = float(c.intermediate_size * dense)
        inner += (c.num_layers - dense) * (experts.top_k * experts.width + experts.shared_width)
    gates = c.num_gdn_layers * (c.value_heads * c.value_dim * (4.0 + out) + 4.0 * c.conv_channels)
    gates += c.num_attention_layers * c.num_heads * c.head_dim * (4.0 + out)
    each = norms + (inner * (4.0 + out) + gates) / layout.tensor
    return Part(read=each * shape.tokens * 0.6, written=each * shape.tokens * 0.4)


def _sums(c: ModelConfig, shape: StepShape, layout: Layout, drafts: int) -> Part:
    """Two sums a layer over the ranks, of 16-bit hidden vectors, and those of the draft head."""
    if layout.tensor == 1:
        return Part()
    each = 2.0 * c.hidden_size
    messages = (2.0 * c.num_layers + 2.0 * drafts + 2.0) * (shape.tokens > 0)
    size = 2.0 * c.num_layers * shape.tokens + 2.0 * drafts * shape.sampled_rows
    return Part(messages=messages, message_bytes=size * each)
