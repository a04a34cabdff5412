"""Rows copied from one stack of layers to another, such as states and their snapshots."""

from __future__ import annotations

from torch import Tensor

from millrace.kernels.dispatch import op


@op
def copy_rows(to: Tensor, to_rows: Tensor, source: Tensor, rows: Tensor) -> None:
    """In every layer, row rows[i] of `source` over row to_rows[i] of `to`.

    to: [L, M, ...]; source: [L, N, ...]; where their rows differ in length, the front of both is
    what counts. Rows are contiguous. to_rows, rows: int64 [R]; no row is written twice.
    """
    if to.shape[0]:
        width = min(to[0, 0].numel(), source[0, 0].numel())
        to.flatten(2)[:, to_rows, :width] = source.flatten(2)[:, rows, :width]
