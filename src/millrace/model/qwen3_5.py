"""The dense Qwen3.5-class model and its MTP draft head, from token ids to logits.

It knows the order of the layers. What each layer computes is in `layers.py`. The caches that they
read and write are passed with every call (`kernels/batch.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from millrace.kernels.batch import Batch, Caches, KVCache, SelectedTokens
from millrace.model.config import ModelConfig
from millrace.model.layers import (
    Attention,
    BuildContext,
    DecoderLayer,
    GatedDeltaNet,
    Linear,
    Norm,
    Rope,
)
from millrace.model.parallel import TensorParallel, check_ranks
from millrace.model.parameter import full_tensor
from millrace.model.vocabulary import Fp8DraftHead, OutputHead, VocabTable


class Qwen3_5(nn.Module):  # noqa: N801, the model's own name
    """One rank's share of the model. Weights are empty until loaded (`weights.py`).

    mtp: the draft head, or None. draft_output: the output head for drafts: the model's own, or an
    FP8 copy, which `quantize_draft_head` fills once the weights are loaded.
    """

    def __init__(self, build: BuildContext, max_len: int, mtp: bool, draft_fp8: bool) -> None:
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
        self, ids: Tensor, batch: Batch, caches: Caches, selected: SelectedTokens | None = None
    ) -> Tensor:
        """ids: int64 [T]; returns the hidden [T, H] after the final norm. Writes the caches.

        selected: the tokens whose hidden vectors are needed. If the last layer is attention, it
        writes only keys and values of the other tokens, and their hidden vectors are NaN.
        """
        x, residual = self.embedding.embed(ids), None
        *layers, (last, cache) = zip(self.layers, caches.layers, strict=True)
        for layer, memory in layers:
            x, residual = layer(x, residual, batch, memory, caches)
        if selected is None or not isinstance(cache, KVCache):
            hidden, _ = self.norm.add(*last(x, residual, batch, cache, caches))
            return hidden
        assert isinstance(last, DecoderLayer)
        stream = last.write_kv(x, residual, batch, cache)
        found, _ = self.norm.add(
            *last(stream[selected.tokens], None, selected.batch, cache, caches)
        )
        return torch.full_like(stream, torch.nan).index_copy_(0, selected.tokens, found)

    @property
    def query_group(self) -> int:
        """Query heads of a KV head, on this rank."""
        c = self.config
        size = self.head.tp.size
        return c.num_heads // size // c.kv_heads_on_rank(size)

    def multiply(self, tokens: int) -> None:
        """A GEMM of each shape that a forward has, of so many tokens, whose results nobody needs:
        so that what is compiled for them, or loaded, is there."""
        seen: set[tuple[int, ...]] = set()
        for module in self.modules():
            if isinstance(module, Linear) and module.weight.shape not in seen:
                seen.add(module.weight.shape)
                module(module.weight.new_zeros(tokens, module.weight.shape[1], dtype=module.dtype))
            if isinstance(module, MTPHead):
                module.attention.multiply(tokens)

    def quantize_draft_head(self) -> int:
        """Fill the FP8 draft head, if there is one, from the loaded weights. Returns its bytes."""
        if not isinstance(self.draft_output, Fp8DraftHead):
            return 0
        self.draft_output.quantize()
        return sum(made.nbytes for made in self.draft_output.buffers())

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, H], of the model or its draft head; returns [R, vocab_size], model dtype."""
        return self.head.logits(hidden)


class MTPHead(nn.Module):
    """The draft head: from token j and the hidden of token j - 1 to a hidden that predicts j + 1.

    It is one attention layer with its own KV cache, whose row j belongs to token j; there is no
    row 0. It writes keys and values for every token, and computes the rest of the layer only at
    the tokens that a draft follows:

        x = mtp.write_kv(ids, hidden, batch, caches)  # all tokens
        out = mtp.draft_hidden(x[rows], selected, caches)  # a few of them
        out = mtp(drafts, out, further, caches)  # both, for the drafts themselves
    """

    def __init__(self, build: BuildContext, embedding: VocabTable, rope: Rope) -> None:
        super().__init__()
        hidden = build.config.hidden_size
        self.embedding = embedding
        self.embedding_norm = Norm(build, "mtp.pre_fc_norm_embedding.weight", hidden)
        self.hidden_norm = Norm(build, "mtp.pre_fc_norm_hidden.weight", hidden)
        self.fc = Linear(build, [full_tensor("mtp.fc.weight", hidden, 2 * hidden)])
        self.layer = _decoder_layer(build, "mtp.layers.0", True, rope, first=1)
        self.norm = Norm(build, "mtp.norm.weight", hidden)

    @property
    def attention(self) -> Attention:
        """What writes the layer's keys and values."""
        mixer = self.layer.mixer
        assert isinstance(mixer, Attention)
        return mixer

    def forward(self, ids: Tensor, hidden: Tensor, batch: Batch, caches: Caches) -> Tensor:
        """`write_kv`, then `draft_hidden` at every token: [T, H]. Arguments as in `write_kv`."""
        return self.draft_hidden(self._input(ids, hidden), batch, caches)

    def write_kv(self, ids: Tensor, hidden: Tensor, batch: Batch, caches: Caches) -> Tensor:
        """Write the tokens' rows of caches.mtp; returns the layer's input x, [T, H].

        ids: int64 [T], the tokens at batch.positions j. hidden: [T, H], of tokens j - 1: the
        model's after its final norm, or this head's own for the draft before. batch needs no rows.
        """
        assert caches.mtp is not None, "the draft head needs its own KV cache"
        x = self._input(ids, hidden)
        self.layer.write_kv(x, None, batch, caches.mtp)
        return x

    def draft_hidden(self, x: Tensor, batch: Batch, caches: Caches) -> Tensor:
        """x: [R, H] of `write_kv`, at the tokens of batch. Returns [R, H] after `mtp.norm`.

        The rows of caches.mtp of all earlier tokens must be written; those of these tokens are
        written here.
        """
        assert caches.mtp is not None, "the draft head needs its own KV cache"
        x, residual = self.layer(x, None, batch, caches.mtp, caches)
        out, _ = self.norm.add(x, residual)
        return out

    def _input(self, ids: Tensor, hidden: Tensor) -> Tensor:
        embedded = self.embedding_norm(self.embedding.embed(ids))
        x: Tensor = self.fc(torch.cat([embedded, self.hidden_norm(hidden)], dim=-1))
        return x


def _decoder_layer(
    build: BuildContext, prefix: str, attention: bool, rope: Rope, first: int = 0
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

    dtype: float32 or bfloat16. max_len: positions of the rotary table (default: the model's
    maximum). mtp: with the draft head. keep_fp8: e4m3 weights of the checkpoint stay e4m3; else
    they become `dtype` when loaded. draft_fp8: drafts use an FP8 copy of the output head; None: as
    keep_fp8 says. Raises ConfigError if the model cannot be split over the ranks.
    """
    tp = tp or TensorParallel()
    keep_fp8 = keep_fp8 and config.fp8
    check_ranks(config, tp.size)
    build = BuildContext(config, tp, dtype, torch.device(device), keep_fp8)
    draft_fp8 = keep_fp8 if draft_fp8 is None else draft_fp8
    mtp = mtp and config.mtp_layers > 0
    return Qwen3_5(build, max_len or config.max_positions, mtp, draft_fp8).eval()
