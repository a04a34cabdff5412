"""The MTP head: one attention layer that shares embedding, rotary table and output head."""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.kernels.batch import Batch, Caches
from millrace.model.build_context import BuildContext
from millrace.model.causal_lm import DraftHead
from millrace.model.layers.attention import Attention
from millrace.model.layers.decoder import DecoderLayer
from millrace.model.layers.linear import linear
from millrace.model.layers.norm import Norm
from millrace.model.parameter import full_tensor
from millrace.model.vocabulary import VocabTable


class MTPHead(DraftHead):
    """layer: a decoder layer of attention, whose first KV row is 1."""

    def __init__(self, build: BuildContext, embedding: VocabTable, layer: DecoderLayer) -> None:
        super().__init__()
        hidden = build.config.hidden_size
        self.embedding = embedding
        self.embedding_norm = Norm(build, "mtp.pre_fc_norm_embedding.weight", hidden)
        self.hidden_norm = Norm(build, "mtp.pre_fc_norm_hidden.weight", hidden)
        fc = full_tensor("mtp.fc.weight", hidden, 2 * hidden)
        self.fc = linear(build, [fc], quantized=False)
        self.layer = layer
        self.norm = Norm(build, "mtp.norm.weight", hidden)

    def forward(self, ids: Tensor, hidden: Tensor, batch: Batch, caches: Caches) -> Tensor:
        return self.draft_hidden(self._input(ids, hidden), batch, caches)

    def write_kv(self, ids: Tensor, hidden: Tensor, batch: Batch, caches: Caches) -> Tensor:
        assert caches.mtp is not None, "the draft head needs its own KV cache"
        x = self._input(ids, hidden)
        self.layer.write_kv(x, None, batch, caches.mtp)
        return x

    def draft_hidden(self, x: Tensor, batch: Batch, caches: Caches) -> Tensor:
        assert caches.mtp is not None, "the draft head needs its own KV cache"
        x, residual = self.layer(x, None, batch, caches.mtp, caches)
        out, _ = self.norm.add(x, residual)
        return out

    def multiply(self, tokens: int) -> None:
        mixer = self.layer.mixer
        assert isinstance(mixer, Attention)
        mixer.qkv_proj.multiply(tokens, mixer.queries_and_gates)

    def _input(self, ids: Tensor, hidden: Tensor) -> Tensor:
        embedded = self.embedding_norm(self.embedding.embed(ids))
        x: Tensor = self.fc(torch.cat([embedded, self.hidden_norm(hidden)], dim=-1))
        return x
