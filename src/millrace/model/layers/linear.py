"""Linear layers in whatever format the checkpoint has their weights."""

from __future__ import annotations

from dataclasses import replace

from millrace.model.build_context import BuildContext
from millrace.model.formats import plain
from millrace.model.parameter import Piece
from millrace.model.weight_format import Linear


def linear(build: BuildContext, pieces: list[Piece], *, quantized: bool = True) -> Linear:
    """A linear layer whose weight is made of pieces, one behind the other.

    It keeps the format of the checkpoint if all pieces have one format, and this rank's share of
    them can be kept in it. Else it has the model dtype. quantized: whether most quantized
    checkpoints have this layer quantized; if not, only its tensors can tell that it is.
    """
    found = build.config.quantization
    form_of = found.format_of if quantized else found.format_of_small
    forms = [form_of(piece.module) for piece in pieces]
    if build.keeps(forms[0]) and len(set(forms)) == 1:
        kept = forms[0].linear(build, pieces)
        if kept is not None:
            return kept
    read_by = zip(pieces, forms, strict=True)
    return plain.PlainLinear(build, [replace(piece, reader=form) for piece, form in read_by])


def row_parallel(build: BuildContext, name: str, out: int, total_in: int) -> Linear:
    """A linear layer with its inputs split over ranks; the caller sums the outputs over ranks."""
    columns = build.tp.share(total_in)
    return linear(build, [Piece(name, (out, total_in), ((0, out),), columns)])


def block_of(build: BuildContext, names: list[str]) -> int:
    """Channels between linear layers of these names that are better not split between ranks."""
    forms = [build.config.quantization.format_of(name) for name in names]
    return max(form.block if build.keeps(form) else 1 for form in forms)
