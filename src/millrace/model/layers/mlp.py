"""The gated MLP."""

from __future__ import annotations

from torch import Tensor, nn

from millrace.kernels.activation import silu_mul
from millrace.kernels.batch import Batch
from millrace.kernels.quantize import silu_mul_quantize
from millrace.model.build_context import BuildContext
from millrace.model.layers.linear import block_of, linear
from millrace.model.layers.norm import NormedInput
from millrace.model.parallel import mlp_unit
from millrace.model.parameter import Piece
from millrace.model.weight_format import Linear


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up in one linear layer.

    width: its channels; None: the model's `intermediate_size`. If they do not divide evenly over
    the ranks, shares are padded with zeros.
    """

    def __init__(self, build: BuildContext, prefix: str, width: int | None = None) -> None:
        super().__init__()
        hidden, self.tp = build.config.hidden_size, build.tp
        width = build.config.intermediate_size if width is None else width
        block = block_of(build, [f"{prefix}.{name}_proj" for name in ("gate", "up", "down")])
        unit = mlp_unit(width, self.tp.size, block)
        start, stop, length = self.tp.padded_share(width, unit)
        pad = length - (stop - start)
        gate_up = [
            Piece(f"{prefix}.{name}_proj.weight", (width, hidden), ((start, stop),), pad_rows=pad)
            for name in ("gate", "up")
        ]
        down = Piece(
            f"{prefix}.down_proj.weight",
            (hidden, width),
            ((0, hidden),),
            (start, stop),
            pad_columns=pad,
        )
        self.gate_up_proj = linear(build, gate_up)
        self.down_proj = linear(build, [down])

    @property
    def inputs(self) -> list[Linear]:
        """The linear layers that read the normed input."""
        return [self.gate_up_proj]

    def forward(self, x: NormedInput, batch: Batch) -> Tensor:
        """x: [T, H]; returns [T, H], this rank's partial sum."""
        gate_up = self.gate_up_proj(x.for_linear(self.gate_up_proj))
        act = silu_mul_quantize if self.down_proj.takes_fp8 else silu_mul
        out: Tensor = self.down_proj(act(gate_up))
        return out
