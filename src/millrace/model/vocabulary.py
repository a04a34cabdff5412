"""The embedding and the output heads, which make logits; their rows are split over the ranks.

Verification uses the head as published. Drafts may use an FP8 copy of it: an inexact draft costs
acceptance, never a wrong token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.kernels.formats import FP8_BLOCK
from millrace.kernels.gemm import fp8_linear, linear, quantize_blocks
from millrace.kernels.quantize import quantize
from millrace.model.build_context import BuildContext
from millrace.model.parallel import TILE, TensorParallel
from millrace.model.parameter import Piece, parameter

ROWS_AT_ONCE = 32 * FP8_BLOCK  # rows quantized at once, by way of float32


class OutputHead(nn.Module):
    """From hidden vectors to logits; the rows of the vocabulary are split over the ranks.

    rows: number of rows of this rank, from `start` on, padding included; the same on all ranks.
    """

    def __init__(self, tp: TensorParallel, vocab_size: int, rows: int) -> None:
        super().__init__()
        self.tp, self.vocab_size, self.rows = tp, vocab_size, rows
        self.start = min(tp.rank * rows, vocab_size)
        self.stop = min(self.start + rows, vocab_size)

    def padded_logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, H]; returns this rank's logits, padding included: [R, rows], model dtype."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, H]; returns [R, vocab_size], model dtype, on every rank."""
        return self.tp.all_gather(self.padded_logits(hidden).contiguous())[:, : self.vocab_size]

    def local_logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, H]; returns the logits of this rank's tokens, `start` to `stop`."""
        return self.padded_logits(hidden)[:, : self.stop - self.start]


class VocabTable(OutputHead):
    """The embedding or the output head, as published.

    It is padded with rows of zeros, so that all ranks have the same number of full tiles.
    """

    def __init__(self, build: BuildContext, name: str) -> None:
        vocab_size, hidden = build.config.vocab_size, build.config.hidden_size
        tile = TILE if build.tp.size > 1 else 1
        super().__init__(build.tp, vocab_size, -(-vocab_size // (build.tp.size * tile)) * tile)
        piece = Piece(name, (vocab_size, hidden), ((self.start, self.stop),))
        piece = replace(piece, reader=build.config.quantization.format_of_small(piece.module))
        self.weight = parameter([piece], build.dtype, build.device, (self.rows, hidden))

    def embed(self, ids: Tensor) -> Tensor:
        """ids: int64 [T]; returns [T, H] on every rank."""
        if self.tp.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.start
        mine = (local >= 0) & (local < self.rows)
        found = F.embedding(torch.where(mine, local, 0), self.weight)
        return self.tp.all_reduce(torch.where(mine.unsqueeze(1), found, 0.0))

    def padded_logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight)


class Fp8DraftHead(OutputHead):
    """A copy of an output head in e4m3 with block scales: half the bytes to read.

    Nothing is loaded into it: `quantize` fills it once the table has its weights. It is padded to
    full blocks of rows, which FP8 GEMMs need.
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
    def quantize(self) -> None:
        """Quantize the table, ROWS_AT_ONCE rows at a time."""
        for first in range(0, len(self.weight), ROWS_AT_ONCE):
            last = first + ROWS_AT_ONCE
            values, scale = quantize_blocks(self.table.weight[first:last])
            self.weight[first:last].zero_()[: len(values)] = values
            self.scale[first // FP8_BLOCK : last // FP8_BLOCK] = scale

    def padded_logits(self, hidden: Tensor) -> Tensor:
        rounded = quantize(hidden)
        return fp8_linear(rounded, self.weight, self.scale, hidden.dtype)[:, : self.rows]
