"""The ends of the model that know the vocabulary: the embedding, and the heads that make logits.

A rank has a part of the vocabulary's rows. Verifying takes the head as it is published; drafts are
guesses, and may take a copy of it in FP8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.kernels.formats import FP8_BLOCK
from millrace.kernels.gemm import fp8_linear, linear, quantize_blocks
from millrace.kernels.quantize import quantize
from millrace.model.layers import Build
from millrace.model.parallel import TILE, TensorParallel
from millrace.model.parameter import Piece, parameter

ROWS_AT_ONCE = 32 * FP8_BLOCK  # of a table, which are float32 while they are rounded


class OutputHead(nn.Module):
    """From hidden vectors to logits, by rows of the vocabulary shared out over the ranks.

    rows: of this rank, those of padding included, `start` on; all ranks have as many.
    """

    def __init__(self, tp: TensorParallel, vocab_size: int, rows: int) -> None:
        super().__init__()
        self.tp, self.vocab_size, self.rows = tp, vocab_size, rows
        self.start = min(tp.rank * rows, vocab_size)
        self.stop = min(self.start + rows, vocab_size)

    def product(self, hidden: Tensor) -> Tensor:
        """hidden: [R, H]; returns [R, rows] of the model dtype, of this rank alone."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, H]; returns [R, vocab_size] of the model dtype on every rank."""
        return self.tp.gather(self.product(hidden).contiguous())[:, : self.vocab_size]

    def local_logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, H]; returns those of this rank's tokens, from `start` on, without padding."""
        return self.product(hidden)[:, : self.stop - self.start]


class VocabTable(OutputHead):
    """Rows of the vocabulary as they are published: the embedding, or the output head.

    The vocabulary is padded with rows of zeros, so that all ranks have as many, in whole tiles.
    """

    def __init__(self, build: Build, name: str) -> None:
        vocab_size, hidden = build.config.vocab_size, build.config.hidden_size
        tile = TILE if build.tp.size > 1 else 1
        super().__init__(build.tp, vocab_size, -(-vocab_size // (build.tp.size * tile)) * tile)
        piece = Piece(name, (vocab_size, hidden), ((self.start, self.stop),))
        self.weight = parameter([piece], build.dtype, build.device, (self.rows, hidden))

    def embed(self, ids: Tensor) -> Tensor:
        """ids: int64 [T]; returns [T, H] on every rank."""
        if self.tp.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.start
        mine = (local >= 0) & (local < self.rows)
        found = F.embedding(torch.where(mine, local, 0), self.weight)
        return self.tp.all_reduce(torch.where(mine.unsqueeze(1), found, 0.0))

    def product(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight)


class Fp8DraftHead(OutputHead):
    """An output head's rows once more, in e4m3 with block scales: half the bytes to read.

    Nothing is loaded into it; once the table has its weights, `derive` makes it. It has rows in
    whole blocks, which products in FP8 want, and the last ones may be more than the table's.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, table: VocabTable) -> None:
        super().__init__(table.tp, table.vocab_size, table.rows)
        self.table = table
        (rows, width), device = table.weight.shape, table.weight.device
        blocks = -(-rows // FP8_BLOCK), -(-width // FP8_BLOCK)
        weight = torch.empty(blocks[0] * FP8_BLOCK, width, dtype=torch.float8_e4m3fn, device=device)
        self.register_buffer("weight", weight, persistent=False)
        scale = torch.empty(*blocks, dtype=torch.float32, device=device)
        self.register_buffer("scale", scale, persistent=False)

    @torch.no_grad()
    def derive(self) -> None:
        """Round the table's rows, some at a time."""
        for first in range(0, len(self.weight), ROWS_AT_ONCE):
            last = first + ROWS_AT_ONCE
            values, scale = quantize_blocks(self.table.weight[first:last])
            self.weight[first:last].zero_()[: len(values)] = values
            self.scale[first // FP8_BLOCK : last // FP8_BLOCK] = scale

    def product(self, hidden: Tensor) -> Tensor:
        rounded = quantize(hidden)
        return fp8_linear(rounded, self.weight, self.scale, hidden.dtype)[:, : self.rows]
