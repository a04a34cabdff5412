"""The layers of a Qwen3.5-class model, each a short forward over the ops in `millrace.kernels`.

A layer knows its weights (this rank's share) and the caches that it is given. It knows no request
and no device. A mixer (attention, GDN) or an MLP returns this rank's partial sum. The next norm
does the all-reduce and the residual add, in one kernel if it can.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from millrace.kernels.activation import sigmoid_gate, silu_mul
from millrace.kernels.attention import attend, norm_rope_store
from millrace.kernels.batch import Batch, Caches, GDNState, KVCache
from millrace.kernels.formats import FP8_BLOCK
from millrace.kernels.gdn import gdn
from millrace.kernels.gemm import fp8_linear, linear
from millrace.kernels.norm import add_rms_norm, gated_rms_norm, rms_norm
from millrace.kernels.quantize import (
    GROUP,
    Quantized,
    gated_rms_norm_quantize,
    rms_norm_quantize,
    sigmoid_gate_quantize,
    silu_mul_quantize,
)
from millrace.kernels.rope import rope_table
from millrace.model.config import ModelConfig
from millrace.model.parallel import TensorParallel, mlp_unit
from millrace.model.parameter import Piece, fits_blocks, fp8_parameters, full_tensor, parameter


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What every layer is built from. keep_fp8: e4m3 weights stay e4m3; else they become
    `dtype`."""

    config: ModelConfig
    tp: TensorParallel
    dtype: torch.dtype
    device: torch.device
    keep_fp8: bool


# --- weights -----------------------------------------------------------------------------------


class Linear(nn.Module):
    """A linear layer whose weight is made of pieces, in the model dtype or e4m3 with block scales.

    If this rank's share of an e4m3 weight would cut scale blocks, the weight is dequantized. An FP8
    layer takes quantized input; input that is not quantized yet is quantized first.
    """

    def __init__(self, build: BuildContext, pieces: list[Piece]) -> None:
        super().__init__()
        self.dtype = build.dtype
        self.weight_scale_inv: nn.Parameter | None = None
        if build.keep_fp8 and pieces[0].quantized and fits_blocks(pieces):
            self.weight, self.weight_scale_inv = fp8_parameters(pieces, build.device)
        else:
            self.weight = parameter(pieces, build.dtype, build.device)

    @property
    def fp8(self) -> bool:
        return self.weight_scale_inv is not None

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """x: [T, in]; returns [T, out] in the model dtype."""
        if self.weight_scale_inv is not None:
            return fp8_linear(x, self.weight, self.weight_scale_inv, self.dtype)
        assert isinstance(x, Tensor)
        return linear(x, self.weight)

    def forward_from(self, first: int, x: Tensor | Quantized) -> Tensor:
        """As forward, but only the outputs from `first` on, where one of the pieces begins.

        The pieces of an e4m3 weight begin at block boundaries.
        """
        if self.weight_scale_inv is not None:
            assert first % FP8_BLOCK == 0
            scales = self.weight_scale_inv[first // FP8_BLOCK :]
            return fp8_linear(x, self.weight[first:], scales, self.dtype)
        assert isinstance(x, Tensor)
        return linear(x, self.weight[first:])


def _row_parallel(
    build: BuildContext, name: str, out: int, total_in: int, quantized: bool
) -> Linear:
    """A linear layer with its inputs split over ranks; the caller sums the outputs over ranks."""
    columns = build.tp.share(total_in)
    return Linear(build, [Piece(name, (out, total_in), ((0, out),), columns, quantized)])


class NormedInput(NamedTuple):
    """A layer's normed input, [T, H], plain and quantized; forms that no linear needs are None."""

    plain: Tensor | None
    quantized: Quantized | None

    def for_linear(self, linear: Linear) -> Tensor | Quantized:
        """The form that `linear` takes."""
        form = self.quantized if linear.fp8 else self.plain
        assert form is not None
        return form


class Norm(nn.Module):
    """An RMS norm with a float32 weight. offset: added to the weight of the checkpoint."""

    def __init__(self, build: BuildContext, name: str, size: int, offset: float = 1.0) -> None:
        super().__init__()
        self.tp, self.eps = build.tp, build.config.eps
        piece = replace(full_tensor(name, size), offset=offset)
        self.weight = parameter([piece], torch.float32, build.device)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum) of the residual and the all-reduced x.

        residual: None before the first layer; then x needs no all-reduce.
        """
        if residual is None:
            return self.forward(x), x
        fused = self.tp.all_reduce_norm(x, residual, self.weight, self.eps, True, False)
        if fused is not None and fused[0] is not None:
            return fused[0], fused[2]
        return add_rms_norm(self.tp.all_reduce(x), residual, self.weight, self.eps)

    def add_for(
        self, linears: list[Linear], x: Tensor, residual: Tensor | None
    ) -> tuple[NormedInput, Tensor]:
        """As `add`, with the norm in the forms that `linears` need."""
        if not any(linear.fp8 for linear in linears):
            plain, total = self.add(x, residual)
            return NormedInput(plain, None), total
        keep = not all(linear.fp8 for linear in linears)
        if residual is not None:
            fused = self.tp.all_reduce_norm(x, residual, self.weight, self.eps, keep, True)
            if fused is not None:
                return NormedInput(*fused[:2]), fused[2]
            x = self.tp.all_reduce(x)
        kept, quantized, total = rms_norm_quantize(x, residual, self.weight, self.eps, keep)
        return NormedInput(kept, quantized), total


class Rope(nn.Module):
    """The rotary table, shared by all attention layers."""

    cos_sin: Tensor

    def __init__(self, build: BuildContext, max_len: int) -> None:
        super().__init__()
        c = build.config
        table = rope_table(
            c.head_dim, c.rotary_dim, c.rope_theta, max_len, c.rope_scaling, build.device
        )
        self.register_buffer("cos_sin", table, persistent=False)


# --- mixers ------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys, and a gate on its output.

    first: the first KV row that exists (1 for the draft head). In a checkpoint q_proj has query
    and gate rows by turns, head by head; here all queries come first, then gates, keys, values.
    """

    def __init__(self, build: BuildContext, prefix: str, rope: Rope, first: int) -> None:
        super().__init__()
        c, self.tp = build.config, build.tp
        self.rope, self.first = rope, first
        self.heads, self.head_dim = c.num_heads // self.tp.size, c.head_dim
        self.kv_heads = c.kv_heads_on_rank(self.tp.size)
        self.scale = c.head_dim**-0.5
        kv_width = self.kv_heads * c.head_dim
        self.widths = [self.heads * c.head_dim] * 2 + [kv_width] * 2
        self.qkv_proj = Linear(build, _attention_pieces(build, prefix))
        self.q_norm = Norm(build, f"{prefix}.q_norm.weight", c.head_dim)
        self.k_norm = Norm(build, f"{prefix}.k_norm.weight", c.head_dim)
        self.o_proj = _row_parallel(
            build, f"{prefix}.o_proj.weight", c.hidden_size, c.num_heads * c.head_dim, c.fp8
        )

    @property
    def inputs(self) -> list[Linear]:
        """The linear layers that read the normed input."""
        return [self.qkv_proj]

    def forward(self, x: NormedInput, batch: Batch, cache: KVCache, caches: Caches) -> Tensor:
        """x: [T, H]; returns [T, H], this rank's partial sum."""
        qkv = self.qkv_proj(x.for_linear(self.qkv_proj))
        q = self._store(qkv, self.widths, batch, cache)
        attended = attend(q, cache, caches.block_table, batch, self.scale, self.first).flatten(1)
        gate = qkv[:, self.widths[0] : 2 * self.widths[0]]
        gated = (sigmoid_gate_quantize if self.o_proj.fp8 else sigmoid_gate)(attended, gate)
        out: Tensor = self.o_proj(gated)
        return out

    def write_kv(self, x: NormedInput, batch: Batch, cache: KVCache) -> None:
        """Compute and store only the keys and values of x."""
        kv = self._keys_and_values(x.for_linear(self.qkv_proj))
        self._store(kv, [0, 0, *self.widths[2:]], batch, cache)

    def multiply(self, tokens: int) -> None:
        """The GEMM of `write_kv`, of so many tokens, whose results nobody needs."""
        weight, dtype = self.qkv_proj.weight, self.qkv_proj.dtype
        self._keys_and_values(weight.new_zeros(tokens, weight.shape[1], dtype=dtype))

    def _keys_and_values(self, x: Tensor | Quantized) -> Tensor:
        return self.qkv_proj.forward_from(sum(self.widths[:2]), x)

    def _store(self, qkv: Tensor, widths: list[int], batch: Batch, cache: KVCache) -> Tensor:
        return norm_rope_store(
            qkv,
            widths,
            self.q_norm.weight,
            self.k_norm.weight,
            self.q_norm.eps,
            batch.positions,
            self.rope.cos_sin,
            cache,
            batch.kv_rows,
        )


def _attention_pieces(build: BuildContext, prefix: str) -> list[Piece]:
    """Queries, gates, keys and values of this rank's heads."""
    c, dim = build.config, build.config.head_dim
    q_shape = (2 * c.num_heads * dim, c.hidden_size)
    kv_shape = (c.num_kv_heads * dim, c.hidden_size)
    heads = range(*build.tp.share(c.num_heads))
    queries = tuple((2 * h * dim, (2 * h + 1) * dim) for h in heads)
    gates = tuple(((2 * h + 1) * dim, (2 * h + 2) * dim) for h in heads)
    first_kv, last_kv = build.tp.kv_share(c.num_kv_heads)
    kv_rows = ((first_kv * dim, last_kv * dim),)
    return [
        Piece(f"{prefix}.q_proj.weight", q_shape, queries, quantized=c.fp8),
        Piece(f"{prefix}.q_proj.weight", q_shape, gates, quantized=c.fp8),
        Piece(f"{prefix}.k_proj.weight", kv_shape, kv_rows, quantized=c.fp8),
        Piece(f"{prefix}.v_proj.weight", kv_shape, kv_rows, quantized=c.fp8),
    ]


class GatedDeltaNet(nn.Module):
    """Linear attention with a decaying state, a short convolution before it and a gated norm after.

    One projection makes q, k, v and z, another, never quantized, a and b.
    """

    A_log: nn.Parameter
    dt_bias: nn.Parameter

    def __init__(self, build: BuildContext, prefix: str) -> None:
        super().__init__()
        c, self.tp = build.config, build.tp
        self.value_heads, self.value_dim = c.value_heads // self.tp.size, c.value_dim
        self.conv_channels = c.conv_channels // self.tp.size
        self.eps = c.eps
        heads, values = self.tp.share(c.value_heads), c.value_heads * c.value_dim
        width, channels = c.hidden_size, _channel_rows(build)
        qkv = Piece(
            f"{prefix}.in_proj_qkv.weight", (c.conv_channels, width), channels, quantized=c.fp8
        )
        z = Piece(
            f"{prefix}.in_proj_z.weight",
            (values, width),
            (self.tp.share(values),),
            quantized=c.fp8,
        )
        ab = [
            Piece(f"{prefix}.in_proj_{name}.weight", (c.value_heads, width), (heads,))
            for name in "ab"
        ]
        self.in_proj_qkvz = Linear(build, [qkv, z])
        self.in_proj_ab = Linear(build, ab)
        self.conv_weight = parameter(
            [Piece(f"{prefix}.conv1d.weight", (c.conv_channels, 1, 4), channels)],
            build.dtype,
            build.device,
            (self.conv_channels, 4),
        )
        for name in ("A_log", "dt_bias"):
            piece = Piece(f"{prefix}.{name}", (c.value_heads,), (heads,))
            setattr(self, name, parameter([piece], torch.float32, build.device))
        self.norm = Norm(build, f"{prefix}.norm.weight", c.value_dim, offset=0.0)
        self.out_proj = _row_parallel(build, f"{prefix}.out_proj.weight", width, values, c.fp8)

    @property
    def inputs(self) -> list[Linear]:
        """The linear layers that read the normed input."""
        return [self.in_proj_qkvz, self.in_proj_ab]

    def forward(self, x: NormedInput, batch: Batch, cache: GDNState, caches: Caches) -> Tensor:
        """x: [T, H]; returns [T, H], this rank's partial sum."""
        projected = self.in_proj_qkvz(x.for_linear(self.in_proj_qkvz))
        qkv, z = projected[:, : self.conv_channels], projected[:, self.conv_channels :]
        a, b = self.in_proj_ab(x.for_linear(self.in_proj_ab)).chunk(2, dim=-1)
        recurrent = (cache, caches.fill, caches.conv_offset, batch)
        o = gdn(qkv, self.conv_weight, a, b, self.A_log, self.dt_bias, *recurrent)
        z = z.unflatten(-1, (self.value_heads, self.value_dim))
        by_head = self.out_proj.fp8 and self.value_dim == GROUP  # else the linear layer quantizes
        norm = gated_rms_norm_quantize if by_head else gated_rms_norm
        out: Tensor = self.out_proj(norm(o, z, self.norm.weight, self.eps))
        return out


def _channel_rows(build: BuildContext) -> tuple[tuple[int, int], ...]:
    """This rank's queries, keys and values among the convolution's channels."""
    c, tp = build.config, build.tp
    keys, values = c.key_heads * c.key_dim, c.value_heads * c.value_dim
    (k0, k1), (v0, v1) = tp.share(keys), tp.share(values)
    return (k0, k1), (keys + k0, keys + k1), (2 * keys + v0, 2 * keys + v1)


# --- MLP and decoder layer
# ---------------------------------------------------------------------------------


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up in one linear layer.

    If the channels do not divide evenly over the ranks, shares are padded with zeros.
    """

    def __init__(self, build: BuildContext, prefix: str) -> None:
        super().__init__()
        c, self.tp = build.config, build.tp
        unit = mlp_unit(c, self.tp.size, build.keep_fp8)
        start, stop, length = self.tp.padded_share(c.intermediate_size, unit)
        pad = length - (stop - start)
        into, out = (c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)
        self.gate_up_proj = Linear(
            build,
            [
                Piece(
                    f"{prefix}.{name}_proj.weight",
                    into,
                    ((start, stop),),
                    quantized=c.fp8,
                    pad_rows=pad,
                )
                for name in ("gate", "up")
            ],
        )
        down = Piece(
            f"{prefix}.down_proj.weight",
            out,
            ((0, c.hidden_size),),
            (start, stop),
            c.fp8,
            pad_columns=pad,
        )
        self.down_proj = Linear(build, [down])

    @property
    def inputs(self) -> list[Linear]:
        """The linear layers that read the normed input."""
        return [self.gate_up_proj]

    def forward(self, x: NormedInput) -> Tensor:
        """x: [T, H]; returns [T, H], this rank's partial sum."""
        gate_up = self.gate_up_proj(x.for_linear(self.gate_up_proj))
        act = silu_mul_quantize if self.down_proj.fp8 else silu_mul
        out: Tensor = self.down_proj(act(gate_up))
        return out


class DecoderLayer(nn.Module):
    """A mixer and an MLP, each on the normed residual stream."""

    def __init__(self, build: BuildContext, prefix: str, mixer: Attention | GatedDeltaNet) -> None:
        super().__init__()
        hidden = build.config.hidden_size
        self.input_norm = Norm(build, f"{prefix}.input_layernorm.weight", hidden)
        self.mixer = mixer
        self.mlp_norm = Norm(build, f"{prefix}.post_attention_layernorm.weight", hidden)
        self.mlp = MLP(build, f"{prefix}.mlp")

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        batch: Batch,
        cache: KVCache | GDNState,
        caches: Caches,
    ) -> tuple[Tensor, Tensor]:
        """x: this rank's partial sum of the last layer's output; residual: the residual stream
        without it; both [T, H]. Returns the same pair for this layer. Without a residual x is the
        residual stream.

        The all-reduce and the addition are done by the next norm.
        """
        normed, residual = self.input_norm.add_for(self.mixer.inputs, x, residual)
        x = self.mixer(normed, batch, cache, caches)
        normed, residual = self.mlp_norm.add_for(self.mlp.inputs, x, residual)
        return self.mlp(normed), residual

    def write_kv(
        self, x: Tensor, residual: Tensor | None, batch: Batch, cache: KVCache | GDNState
    ) -> Tensor:
        """For attention layers: store keys and values only. Returns the residual stream [T, H];
        `forward` can continue with any of its rows, without a residual.
        """
        assert isinstance(self.mixer, Attention)
        assert isinstance(cache, KVCache)
        normed, stream = self.input_norm.add_for(self.mixer.inputs, x, residual)
        self.mixer.write_kv(normed, batch, cache)
        return stream
