"""Grouped-query attention over paged keys and values."""

from __future__ import annotations

from torch import Tensor, nn

from millrace.kernels.activation import sigmoid_gate
from millrace.kernels.attention import attend, norm_rope_store
from millrace.kernels.batch import Batch, Caches, GDNState, KVCache
from millrace.kernels.quantize import Quantized, sigmoid_gate_quantize
from millrace.kernels.rope import rope_table
from millrace.model.build_context import BuildContext
from millrace.model.layers.linear import linear, row_parallel
from millrace.model.layers.norm import Norm, NormedInput
from millrace.model.parameter import Piece
from millrace.model.weight_format import Linear


class Rope(nn.Module):
    """A rotary table, shared by the attention layers that rotate alike."""

    cos_sin: Tensor

    def __init__(self, build: BuildContext, max_len: int) -> None:
        super().__init__()
        c = build.config
        table = rope_table(
            c.head_dim, c.rotary_dim, c.rope_theta, max_len, c.rope_scaling, build.device
        )
        self.register_buffer("cos_sin", table, persistent=False)


class Attention(nn.Module):
    """Grouped-query attention: one projection for queries, gates, keys and values.

    gated: q_proj of the checkpoint also has gates, query and gate rows by turns, head by head; here
    all queries come first. The sigmoid of a gate multiplies the output of its head. qk_norm:
    queries and keys are normed, head by head. first: the first KV row that exists (1 for the draft
    head). inputs: channels of what it reads; None: the model's hidden size.
    """

    def __init__(
        self,
        build: BuildContext,
        prefix: str,
        rope: Rope,
        *,
        gated: bool = False,
        qk_norm: bool = True,
        first: int = 0,
        inputs: int | None = None,
    ) -> None:
        super().__init__()
        c, self.tp = build.config, build.tp
        self.rope, self.first, self.gated, self.eps = rope, first, gated, c.eps
        self.heads, self.head_dim = c.num_heads // self.tp.size, c.head_dim
        self.kv_heads = c.kv_heads_on_rank(self.tp.size)
        self.scale = c.head_dim**-0.5
        q_width, kv_width = self.heads * c.head_dim, self.kv_heads * c.head_dim
        self.widths = [q_width, q_width if gated else 0, kv_width, kv_width]
        self.qkv_proj = linear(build, _qkv_pieces(build, prefix, gated, inputs))
        self.q_norm, self.k_norm = (
            Norm(build, f"{prefix}.{name}_norm.weight", c.head_dim) if qk_norm else None
            for name in "qk"
        )
        self.o_proj = row_parallel(
            build, f"{prefix}.o_proj.weight", c.hidden_size, c.num_heads * c.head_dim
        )

    @property
    def inputs(self) -> list[Linear]:
        """The linear layers that read the normed input."""
        return [self.qkv_proj]

    def forward(
        self, x: NormedInput, batch: Batch, cache: KVCache | GDNState, caches: Caches
    ) -> Tensor:
        """x: [T, H]; returns [T, H], this rank's partial sum."""
        assert isinstance(cache, KVCache)
        qkv = self.qkv_proj(x.for_linear(self.qkv_proj))
        q = self._store(qkv, self.widths, batch, cache)
        attended: Tensor | Quantized
        attended = attend(q, cache, caches.block_table, batch, self.scale, self.first).flatten(1)
        if self.gated:
            gate = qkv[:, self.widths[0] : 2 * self.widths[0]]
            attended = (sigmoid_gate_quantize if self.o_proj.takes_fp8 else sigmoid_gate)(
                attended, gate
            )
        out: Tensor = self.o_proj(attended)
        return out

    def write_kv(self, x: NormedInput, batch: Batch, cache: KVCache) -> None:
        """Compute and store only the keys and values of x."""
        kv = self.qkv_proj.forward_from(self.queries_and_gates, x.for_linear(self.qkv_proj))
        self._store(kv, [0, 0, *self.widths[2:]], batch, cache)

    @property
    def queries_and_gates(self) -> int:
        """Outputs of the projection that `write_kv` does without."""
        return sum(self.widths[:2])

    def _store(self, qkv: Tensor, widths: list[int], batch: Batch, cache: KVCache) -> Tensor:
        return norm_rope_store(
            qkv,
            widths,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            self.eps,
            batch.positions,
            self.rope.cos_sin,
            cache,
            batch.kv_rows,
        )


def _qkv_pieces(build: BuildContext, prefix: str, gated: bool, inputs: int | None) -> list[Piece]:
    """Queries, gates, keys and values of this rank's heads."""
    c, dim, parts = build.config, build.config.head_dim, 2 if gated else 1
    inputs = inputs or c.hidden_size
    q_shape = (parts * c.num_heads * dim, inputs)
    kv_shape = (c.num_kv_heads * dim, inputs)
    heads = range(*build.tp.share(c.num_heads))
    first_kv, last_kv = build.tp.kv_share(c.num_kv_heads)
    kv_rows = ((first_kv * dim, last_kv * dim),)
    if gated:
        queries = [
            Piece(
                f"{prefix}.q_proj.weight",
                q_shape,
                tuple(((2 * h + part) * dim, (2 * h + part + 1) * dim) for h in heads),
            )
            for part in range(2)
        ]
    else:
        rows = ((heads.start * dim, heads.stop * dim),)
        queries = [Piece(f"{prefix}.q_proj.weight", q_shape, rows)]
    return [
        *queries,
        Piece(f"{prefix}.k_proj.weight", kv_shape, kv_rows),
        Piece(f"{prefix}.v_proj.weight", kv_shape, kv_rows),
    ]
