"""The dense Qwen3.5-class model and its MTP draft head, from token ids to logits.

Knows the order of layers; what each computes stands in `layers.py`, and what memory each reads
and writes is handed in with every call (`kernels/batch.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from millrace.kernels.batch import Batch, Caches, KVCache, SelectedTokens
from millrace.model.config import ModelConfig
from millrace.model.layers import (
    Attention,
    Build,
    DecoderLayer,
    GatedDeltaNet,
    Linear,
    Norm,
    Rope,
)
from millrace.model.parallel import TensorParallel, check_ranks
from millrace.model.parameter import whole
from millrace.model.vocabulary import Fp8DraftHead, OutputHead, VocabTable


class Qwen3_5(nn.Module):  # noqa: N801, the model's own name
    """One rank's share of the model. Weights are empty until loaded (`weights.py`).

    mtp: the draft head, or None. draft_output: what makes logits of its hidden vectors: the output
    head, or the same rounded to FP8, which needs `derive` once there are weights.
    """

    def __init__(self, build: Build, max_len: int, mtp: bool, draft_fp8: bool) -> None:
        super().__init__()
        self.config = build.config
        self.embedding = VocabTable(build, "model.embed_tokens.weight")
        rope = Rope(build, max_len)
        self.layers = nn.ModuleList(
            _decoder_layer(build, f"model.layers.{i}", kind == "full_attention", rope)
            for i, kind in enumerate(build.config.layer_types)
        )
        self.norm = Norm(build, "model.norm.weight", build.config.hidden_size)
        tied = build.config.tied
        self.head = self.embedding if tied else VocabTable(build, "lm_head.weight")
        self.mtp = MTPHead(build, self.embedding, rope) if mtp else None
        rounded = mtp and draft_fp8
        self.draft_output: OutputHead = Fp8DraftHead(self.head) if rounded else self.head

    def forward(
        self, ids: Tensor, batch: Batch, caches: Caches, asked: SelectedTokens | None = None
    ) -> Tensor:
        """ids: int64 [T]; returns the hidden [T, H] after the final norm. Writes the caches.

        asked: the tokens whose hidden are read. That of others is NaN where the last layer is of
        attention, which then keeps their keys and values and computes no more of them.
        """
        x, residual = self.embedding.embed(ids), None
        *layers, (last, cache) = zip(self.layers, caches.layers, strict=True)
        for layer, memory in layers:
            x, residual = layer(x, residual, batch, memory, caches)
        if asked is None or not isinstance(cache, KVCache):
            hidden, _ = self.norm.add(*last(x, residual, batch, cache, caches))
            return hidden
        assert isinstance(last, DecoderLayer)
        stream = last.write_kv(x, residual, batch, cache)
        found, _ = self.norm.add(*last(stream[asked.tokens], None, asked.batch, cache, caches))
        return torch.full_like(stream, torch.nan).index_copy_(0, asked.tokens, found)

    def derive(self) -> int:
        """Make what is made of loaded weights, once these are there; returns the bytes it takes."""
        if not isinstance(self.draft_output, Fp8DraftHead):
            return 0
        self.draft_output.derive()
        return sum(made.nbytes for made in self.draft_output.buffers())

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, H], of the model or its draft head; returns [R, vocab_size], model dtype."""
        return self.head.logits(hidden)


class MTPHead(nn.Module):
    """Drafts: from token j and the hidden of token j - 1, a hidden whose logits guess token j + 1.

    One attention layer with keys and values of its own, whose row j belongs to token j; there is
    no row 0. It remembers every token, and computes the rest of the layer only where it guesses:

        x = mtp.remember(ids, hidden, places, caches)  # of all tokens
        out = mtp.guess(x[rows], batch, caches)  # at a few of them
        out = mtp(drafted, out, further, caches)  # both, of further tokens
    """

    def __init__(self, build: Build, embedding: VocabTable, rope: Rope) -> None:
        super().__init__()
        hidden = build.config.hidden_size
        self.embedding = embedding
        self.embedding_norm = Norm(build, "mtp.pre_fc_norm_embedding.weight", hidden)
        self.hidden_norm = Norm(build, "mtp.pre_fc_norm_hidden.weight", hidden)
        self.fc = Linear(build, [whole("mtp.fc.weight", hidden, 2 * hidden)])
        self.layer = _decoder_layer(build, "mtp.layers.0", True, rope, first=1)
        self.norm = Norm(build, "mtp.norm.weight", hidden)

    def forward(self, ids: Tensor, hidden: Tensor, batch: Batch, caches: Caches) -> Tensor:
        """Remember and guess at every token: [T, H]. Arguments as of `write_kv`."""
        return self.draft_hidden(self._joined(ids, hidden), batch, caches)

    def write_kv(self, ids: Tensor, hidden: Tensor, batch: Batch, caches: Caches) -> Tensor:
        """Write the tokens' rows of caches.mtp; returns the layer's input x, [T, H].

        ids: int64 [T], tokens at batch.positions j; hidden: [T, H], of tokens j - 1: the model's,
        after its final norm, or this head's own of the draft before. Of batch it needs no rows.
        """
        assert caches.mtp is not None, "the draft head runs with keys and values of its own"
        x = self._joined(ids, hidden)
        self.layer.write_kv(x, None, batch, caches.mtp)
        return x

    def draft_hidden(self, x: Tensor, batch: Batch, caches: Caches) -> Tensor:
        """x: [R, H] of `write_kv`, at the tokens of batch; returns [R, H] after `mtp.norm`.

        All tokens before them must be remembered; their own rows of caches.mtp it writes itself.
        """
        assert caches.mtp is not None, "the draft head runs with keys and values of its own"
        x, residual = self.layer(x, None, batch, caches.mtp, caches)
        out, _ = self.norm.add(x, residual)
        return out

    def _joined(self, ids: Tensor, hidden: Tensor) -> Tensor:
        embedded = self.embedding_norm(self.embedding.embed(ids))
        x: Tensor = self.fc(torch.cat([embedded, self.hidden_norm(hidden)], dim=-1))
        return x


def _decoder_layer(
    build: Build, prefix: str, attention: bool, rope: Rope, first: int = 0
) -> DecoderLayer:
    if attention:
        return DecoderLayer(build, prefix, Attention(build, f"{prefix}.self_attn", rope, first))
    return DecoderLayer(build, prefix, GatedDeltaNet(build, f"{prefix}.linear_attn"))


def build_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    tp: TensorParallel | None = None,
    max_len: int | None = None,
    mtp: bool = False,
    keep_fp8: bool = False,
    draft_fp8: bool | None = False,
) -> Qwen3_5:
    """One rank's model with empty weights.

    dtype: float32 or bfloat16. max_len: positions that the rotary table covers (default: all of
    the model's). mtp: with the draft head. keep_fp8: e4m3 weights stay e4m3, where the checkpoint
    has them; else they become `dtype` when loaded. draft_fp8: drafts are made with an output head
    in FP8, whatever the checkpoint is; None: where e4m3 weights stay e4m3. Raises ConfigError for
    a rank count that cannot share out the model.
    """
    tp = tp or TensorParallel()
    keep_fp8 = keep_fp8 and config.fp8
    check_ranks(config, tp.size)
    build = Build(config, tp, dtype, torch.device(device), keep_fp8)
    draft_fp8 = keep_fp8 if draft_fp8 is None else draft_fp8
    mtp = mtp and config.mtp_layers > 0
    return Qwen3_5(build, max_len or config.max_positions, mtp, draft_fp8).eval()
