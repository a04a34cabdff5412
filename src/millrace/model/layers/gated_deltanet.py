"""Gated DeltaNet: linear attention with a decaying state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from millrace.kernels.batch import Batch, Caches, GDNState, KVCache
from millrace.kernels.gdn import gdn
from millrace.kernels.norm import gated_rms_norm
from millrace.kernels.quantize import GROUP, gated_rms_norm_quantize
from millrace.model.build_context import BuildContext
from millrace.model.initializers import convolution, log_decay, step_bias
from millrace.model.layers.linear import linear, row_parallel
from millrace.model.layers.norm import Norm, NormedInput
from millrace.model.parameter import Piece, parameter
from millrace.model.weight_format import Linear


class GatedDeltaNet(nn.Module):
    """Linear attention with a decaying state, a short convolution before it and a gated norm after.

    One projection makes q, k, v and z, another, never quantized, a and b. by_head: the checkpoint
    has each of the two in one tensor, key head by key head; else q, k and v in one, and z, a and b.
    """

    A_log: nn.Parameter
    dt_bias: nn.Parameter

    def __init__(self, build: BuildContext, prefix: str, *, by_head: bool = False) -> None:
        super().__init__()
        c, self.tp = build.config, build.tp
        self.value_heads, self.value_dim = c.value_heads // self.tp.size, c.value_dim
        self.conv_channels = c.conv_channels // self.tp.size
        self.eps = c.eps
        heads, values = self.tp.share(c.value_heads), c.value_heads * c.value_dim
        width, channels = c.hidden_size, _channel_rows(build)
        qkvz, ab = (_by_head if by_head else _apart)(build, prefix)
        self.in_proj_qkvz = linear(build, qkvz)
        self.in_proj_ab = linear(build, ab, quantized=False)
        taps = Piece(
            f"{prefix}.conv1d.weight", (c.conv_channels, 1, 4), channels, random=convolution
        )
        self.conv_weight = parameter([taps], build.dtype, build.device, (self.conv_channels, 4))
        for name, random in (("A_log", log_decay), ("dt_bias", step_bias)):
            piece = Piece(f"{prefix}.{name}", (c.value_heads,), (heads,), random=random)
            setattr(self, name, parameter([piece], torch.float32, build.device))
        self.norm = Norm(build, f"{prefix}.norm.weight", c.value_dim, offset=0.0)
        self.out_proj = row_parallel(build, f"{prefix}.out_proj.weight", width, values)

    @property
    def inputs(self) -> list[Linear]:
        """The linear layers that read the normed input."""
        return [self.in_proj_qkvz, self.in_proj_ab]

    def forward(
        self, x: NormedInput, batch: Batch, cache: KVCache | GDNState, caches: Caches
    ) -> Tensor:
        """x: [T, H]; returns [T, H], this rank's partial sum."""
        assert isinstance(cache, GDNState)
        projected = self.in_proj_qkvz(x.for_linear(self.in_proj_qkvz))
        qkv, z = projected[:, : self.conv_channels], projected[:, self.conv_channels :]
        a, b = self.in_proj_ab(x.for_linear(self.in_proj_ab)).chunk(2, dim=-1)
        recurrent = (cache, caches.fill, caches.conv_offset, batch)
        o = gdn(qkv, self.conv_weight, a, b, self.A_log, self.dt_bias, *recurrent)
        z = z.unflatten(-1, (self.value_heads, self.value_dim))
        # If a head is no group of the quantization, the linear layer quantizes.
        by_head = self.out_proj.takes_fp8 and self.value_dim == GROUP
        norm = gated_rms_norm_quantize if by_head else gated_rms_norm
        out: Tensor = self.out_proj(norm(o, z, self.norm.weight, self.eps))
        return out


def _channel_rows(build: BuildContext) -> tuple[tuple[int, int], ...]:
    """This rank's queries, keys and values among the convolution's channels."""
    c, tp = build.config, build.tp
    keys, values = c.key_heads * c.key_dim, c.value_heads * c.value_dim
    (k0, k1), (v0, v1) = tp.share(keys), tp.share(values)
    return (k0, k1), (keys + k0, keys + k1), (2 * keys + v0, 2 * keys + v1)


def _apart(build: BuildContext, prefix: str) -> tuple[list[Piece], list[Piece]]:
    """The projections of q, k, v and z, and of a and b, from tensors of their own."""
    c, tp, width = build.config, build.tp, build.config.hidden_size
    values = c.value_heads * c.value_dim
    qkv = Piece(f"{prefix}.in_proj_qkv.weight", (c.conv_channels, width), _channel_rows(build))
    z = Piece(f"{prefix}.in_proj_z.weight", (values, width), (tp.share(values),))
    heads = (tp.share(c.value_heads),)
    ab = [Piece(f"{prefix}.in_proj_{name}.weight", (c.value_heads, width), heads) for name in "ab"]
    return [qkv, z], ab


def _by_head(build: BuildContext, prefix: str) -> tuple[list[Piece], list[Piece]]:
    """The same from two tensors: of each key head q, k, v and z, and b and a of its value heads."""
    c = build.config
    heads = range(*build.tp.share(c.key_heads))
    group = c.value_heads // c.key_heads

    def pieces(name: str, sizes: list[int]) -> list[Piece]:
        total, starts = sum(sizes), [sum(sizes[:part]) for part in range(len(sizes))]
        shape = c.key_heads * total, c.hidden_size
        return [
            Piece(
                f"{prefix}.{name}.weight",
                shape,
                tuple((h * total + start, h * total + start + size) for h in heads),
            )
            for start, size in zip(starts, sizes, strict=True)
        ]

    values = group * c.value_dim
    b, a = pieces("in_proj_ba", [group, group])
    return pieces("in_proj_qkvz", [c.key_dim, c.key_dim, values, values]), [a, b]
