"""The model as the runtime sees it: from token ids to hidden vectors to logits, with a draft head.

What is computed in between is up to the families (`families/`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from millrace.kernels.batch import Batch, Caches, SelectedTokens
from millrace.model.config import ModelConfig
from millrace.model.vocabulary import Fp8DraftHead, OutputHead, VocabTable
from millrace.model.weight_format import HasGemms


class DraftHead(nn.Module, ABC):
    """From token j and the hidden of token j - 1 to a hidden that predicts j + 1.

    It has its own KV cache, `caches.mtp`, whose row j belongs to token j; there is no row 0. It
    writes keys and values for every token, and computes the rest only at the tokens that a draft
    follows:

        x = head.write_kv(ids, hidden, batch, caches)  # all tokens
        out = head.draft_hidden(x[rows], selected, caches)  # a few of them
        out = head(drafts, out, further, caches)  # both, for the drafts themselves

    A head may read more of the model than its last hidden vector: taps: the residual streams before
    these layers, which `fuse` makes `fused_width` channels of. They stand behind the H channels of
    the model's hidden vectors then, and `features` are what the head reads of all of them.
    """

    taps: tuple[int, ...] = ()
    fused_width = 0

    def fuse(self, streams: Sequence[Tensor]) -> Tensor:
        """streams: [T, H] for each of `taps`. Returns [T, fused_width]."""
        raise NotImplementedError

    def features(self, hidden: Tensor) -> Tensor:
        """hidden: [T, H + fused_width], of the model; returns what the head reads of it."""
        return hidden

    def normed(self, feature: Tensor) -> Tensor:
        """From this head's own output, [R, H], to what the output head for drafts reads."""
        return feature

    @abstractmethod
    def forward(self, ids: Tensor, hidden: Tensor, batch: Batch, caches: Caches) -> Tensor:
        """`write_kv`, then `draft_hidden` at every token: [T, H]. Arguments as in `write_kv`."""

    @abstractmethod
    def write_kv(self, ids: Tensor, hidden: Tensor, batch: Batch, caches: Caches) -> Tensor:
        """Write the tokens' rows of caches.mtp; returns the input of `draft_hidden`, [T, H].

        ids: int64 [T], the tokens at batch.positions j. hidden: [T, H], of tokens j - 1: the
        model's after its final norm, or this head's own for the draft before. batch needs no rows.
        """

    @abstractmethod
    def draft_hidden(self, x: Tensor, batch: Batch, caches: Caches) -> Tensor:
        """x: [R, H] of `write_kv`, at the tokens of batch. Returns [R, H] for the output head.

        The rows of caches.mtp of all earlier tokens must be written; those of these tokens are
        written here.
        """

    @abstractmethod
    def multiply(self, tokens: int) -> None:
        """The GEMMs that only `write_kv` has, of so many tokens, whose results nobody needs."""


class CausalLM(nn.Module, ABC):
    """One rank's share of a model. Weights are empty until loaded (`weights.py`).

    head: the output head. mtp: the draft head, or None. draft_output: the output head for drafts:
    the model's own, or an FP8 copy, which `quantize_draft_head` fills once the weights are loaded.
    draft_model: a smaller model that drafts, or None.
    """

    mtp: DraftHead | None
    draft_model: CausalLM | None

    def __init__(self, config: ModelConfig, head: VocabTable) -> None:
        super().__init__()
        self.config, self.head = config, head
        self.draft_output: OutputHead = head
        self.mtp = None
        self.draft_model = None

    @abstractmethod
    def forward(
        self, ids: Tensor, batch: Batch, caches: Caches, selected: SelectedTokens | None = None
    ) -> Tensor:
        """ids: int64 [T]; returns the hidden [T, H] after the final norm, and what the draft head's
        taps make behind it. Writes the caches.

        selected: the tokens whose hidden vectors are needed; those of others may be NaN.
        """

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """ids: int64 [T]; returns the tokens' embeddings [T, H]."""

    @property
    def hidden_width(self) -> int:
        """Channels of the vectors that `forward` returns."""
        return self.config.hidden_size + (0 if self.mtp is None else self.mtp.fused_width)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, H] or wider, of the model or its draft head; returns [R, vocab_size], model
        dtype."""
        return self.head.logits(hidden[:, : self.config.hidden_size])

    @property
    def query_group(self) -> int:
        """Query heads of a KV head, on this rank."""
        size = self.head.tp.size
        return self.config.num_heads // size // self.config.kv_heads_on_rank(size)

    def multiply(self, tokens: int) -> None:
        """A GEMM of each shape that a forward has, of so many tokens, whose results nobody needs:
        so that what is compiled for them, or loaded, is there."""
        seen: set[tuple[int, ...]] = set()
        for module in self.modules():
            if isinstance(module, HasGemms) and module.gemm_shape not in seen:
                seen.add(module.gemm_shape)
                module.multiply(tokens)
        if self.mtp is not None:
            self.mtp.multiply(tokens)

    def use_fp8_draft_head(self) -> None:
        """Draft with an FP8 copy of the output head."""
        self.draft_output = Fp8DraftHead(self.head)

    def quantize_draft_head(self) -> int:
        """Fill the FP8 draft head, if there is one, from the loaded weights. Returns its bytes."""
        if not isinstance(self.draft_output, Fp8DraftHead):
            return 0
        self.draft_output.quantize()
        return sum(made.nbytes for made in self.draft_output.buffers())
