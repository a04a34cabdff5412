"""Decoder layers and their stack. A family hands them what they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from millrace.kernels.batch import Batch, Caches, GDNState, KVCache, SelectedTokens
from millrace.model.build_context import BuildContext
from millrace.model.causal_lm import CausalLM
from millrace.model.layers.attention import Attention
from millrace.model.layers.norm import Norm, NormedInput, ReadsNormed
from millrace.model.vocabulary import VocabTable
from millrace.model.weight_format import Linear


class Mixer(Protocol):
    """What mixes tokens: attention or a recurrence. A module."""

    @property
    def inputs(self) -> list[Linear]:
        """The linear layers that read the normed input."""
        ...

    def __call__(
        self, x: NormedInput, batch: Batch, cache: KVCache | GDNState, caches: Caches
    ) -> Tensor:
        """x: [T, H]; returns [T, H], this rank's partial sum."""
        ...


class FeedForward(Protocol):
    """What works on each token by itself: an MLP. A module."""

    @property
    def inputs(self) -> Sequence[ReadsNormed]:
        """What reads the normed input: linear layers, and experts."""
        ...

    def __call__(self, x: NormedInput, batch: Batch) -> Tensor:
        """x: [T, H]; returns [T, H], this rank's partial sum."""
        ...


class DecoderLayer(nn.Module):
    """A mixer and an MLP, each on the normed residual stream."""

    def __init__(self, build: BuildContext, prefix: str, mixer: Mixer, mlp: FeedForward) -> None:
        super().__init__()
        hidden = build.config.hidden_size
        self.input_norm = Norm(build, f"{prefix}.input_layernorm.weight", hidden)
        self.mixer = mixer
        self.mlp_norm = Norm(build, f"{prefix}.post_attention_layernorm.weight", hidden)
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        batch: Batch,
        cache: KVCache | GDNState,
        caches: Caches,
    ) -> tuple[Tensor, Tensor]:
        """x: this rank's partial sum of the last layer's output; residual: the residual stream
        without it; both [T, H]. Returns the same pair for this layer. Without a residual x is the
        residual stream.

        The all-reduce and the addition are done by the next norm.
        """
        normed, residual = self.input_norm.add_for(self.mixer.inputs, x, residual)
        x = self.mixer(normed, batch, cache, caches)
        normed, residual = self.mlp_norm.add_for(self.mlp.inputs, x, residual)
        return self.mlp(normed, batch), residual

    def write_kv(
        self, x: Tensor, residual: Tensor | None, batch: Batch, cache: KVCache | GDNState
    ) -> Tensor:
        """For attention layers: store keys and values only. Returns the residual stream [T, H];
        `forward` can continue with any of its rows, without a residual.
        """
        assert isinstance(self.mixer, Attention)
        assert isinstance(cache, KVCache)
        normed, stream = self.input_norm.add_for(self.mixer.inputs, x, residual)
        self.mixer.write_kv(normed, batch, cache)
        return stream


class Decoder(CausalLM):
    """An embedding, decoder layers, a norm and an output head.

    prefix: of the names of embedding and norm in the checkpoint.
    """

    def __init__(
        self, build: BuildContext, layers: Iterable[DecoderLayer], prefix: str = "model"
    ) -> None:
        embedding = VocabTable(build, f"{prefix}.embed_tokens.weight")
        tied = build.config.tied
        super().__init__(build.config, embedding if tied else VocabTable(build, "lm_head.weight"))
        self.embedding = embedding
        self.layers = nn.ModuleList(layers)
        self.norm = Norm(build, f"{prefix}.norm.weight", build.config.hidden_size)

    def forward(
        self, ids: Tensor, batch: Batch, caches: Caches, selected: SelectedTokens | None = None
    ) -> Tensor:
        """As CausalLM. If the last layer is attention, it writes only keys and values of the tokens
        that are not selected, and their hidden vectors are NaN.
        """
        x, residual = self.embedding.embed(ids), None
        taps = () if self.mtp is None else self.mtp.taps
        streams: dict[int, Tensor] = {}
        *layers, (last, cache) = zip(self.layers, caches.layers, strict=True)
        for index, (layer, memory) in enumerate(layers):
            if index in taps:
                streams[index] = x if residual is None else x + residual
            x, residual = layer(x, residual, batch, memory, caches)
        if taps:
            return self._with_fused(x, residual, streams, batch, caches)
        if selected is None or not isinstance(cache, KVCache):
            hidden, _ = self.norm.add(*last(x, residual, batch, cache, caches))
            return hidden
        assert isinstance(last, DecoderLayer)
        stream = last.write_kv(x, residual, batch, cache)
        found, _ = self.norm.add(
            *last(stream[selected.tokens], None, selected.batch, cache, caches)
        )
        return torch.full_like(stream, torch.nan).index_copy_(0, selected.tokens, found)

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding.embed(ids)

    def _with_fused(
        self,
        x: Tensor,
        residual: Tensor | None,
        streams: dict[int, Tensor],
        batch: Batch,
        caches: Caches,
    ) -> Tensor:
        """The last layer and the norm, and what the draft head makes of the streams."""
        assert self.mtp is not None
        index = len(self.layers) - 1
        if index in self.mtp.taps:
            streams[index] = x if residual is None else x + residual
        hidden, _ = self.norm.add(
            *self.layers[index](x, residual, batch, caches.layers[index], caches)
        )
        fused = self.mtp.fuse([streams[tap] for tap in self.mtp.taps])
        return torch.cat([hidden, fused], dim=-1)
