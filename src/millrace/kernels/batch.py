"""The input of a forward pass besides token ids: positions of the tokens, and memory.

A `Batch` describes the rows of one step, `Caches` the device memory that outlives it. Both are
plain records: the runtime fills them, and the model passes them to the ops in `millrace.kernels`.

Conventions that every op keeps:

* Tokens of a step are flat, `T` of them: first the decode rows (each of the same `width`), then the
  prefill rows, one after another.
* Slot 0 and page 0 are null: padded rows use slot 0, whose block table is all zeros, so that
  nobody reads what they write.
* Lengths on the device are the truth. The host knows upper bounds only (`max_context`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows that each verify `width` = 1 + k tokens from the device's own lengths.

    slots: int64 [D]. starts: int64 [D], position of the row's first token (tokens already in the
    caches). A padded row has slot 0 and start 0. contiguous_from: the first slot, when the slots
    are neighbours in ascending order (a hint: their states can be read in place).
    """

    slots: Tensor
    starts: Tensor
    width: int
    max_context: int
    contiguous_from: int | None = None

    def __post_init__(self) -> None:
        # Kernels read both as plain arrays and ignore strides.
        assert self.slots.is_contiguous()
        assert self.starts.is_contiguous()


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """Rows of prompt tokens, of any lengths.

    slots: int64 [P]. starts: int64 [P]. counts and host_starts: the lengths and starts as host
    integers; offsets: int32 [P + 1], cumulative counts on the device.
    """

    slots: Tensor
    starts: Tensor
    offsets: Tensor
    counts: tuple[int, ...]
    host_starts: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.slots.is_contiguous()
        assert self.starts.is_contiguous()

    @property
    def max_count(self) -> int:
        return max(self.counts)

    @property
    def max_context(self) -> int:
        return max(s + c for s, c in zip(self.host_starts, self.counts, strict=True))


@dataclass(frozen=True, slots=True)
class Batch:
    """The T tokens of one forward.

    token_slots: int64 [T]. positions: int64 [T], position of each token in its sequence. kv_rows:
    int64 [T], the flat row (page * page_size + offset) for each token's keys and values.
    decode and prefill may both be None if only keys and values are written.
    """

    token_slots: Tensor
    positions: Tensor
    kv_rows: Tensor
    decode: DecodeRows | None
    prefill: PrefillRows | None

    @property
    def max_context(self) -> int:
        """An upper bound of every token's position + 1."""
        return max(part.max_context for part in (self.decode, self.prefill) if part)

    @property
    def num_decode_tokens(self) -> int:
        return 0 if self.decode is None else self.decode.slots.shape[0] * self.decode.width


@dataclass(frozen=True, slots=True)
class SelectedTokens:
    """The tokens of a batch whose hidden vectors are needed.

    tokens: int64 [R], in ascending order. batch: the same tokens, each a decode row of its own.
    """

    tokens: Tensor
    batch: Batch


@dataclass(slots=True)
class KVCache:
    """Keys and values of one attention layer: each [pages, page_size, kv_heads, head_dim].

    dtype float32, bfloat16 or float8_e4m3fn (scale 1.0).
    """

    keys: Tensor
    values: Tensor


@dataclass(slots=True)
class GDNState:
    """Recurrent state of one Gated DeltaNet layer, one row for each slot (N rows, row 0 null).

    state: [N, value_heads, key_dim, value_dim], the state S folded at the last commit; float32 or
    bfloat16. Since then, in the window form, row i < fill of a slot holds
    window_k [N, key_heads, W, key_dim], the L2-normalised key;
    window_u [N, value_heads, W, value_dim] float32, the delta-rule update u_i; and
    window_g [N, value_heads, W] float32, log A_i: the sum of g from the commit up to and with i.
    conv: [N, 3 + k, channels], the last conv inputs, of which rows offset .. offset + 2 precede
    the next token.
    """

    state: Tensor
    window_k: Tensor
    window_u: Tensor
    window_g: Tensor
    conv: Tensor


@dataclass(slots=True)
class Caches:
    """All device memory that outlives a step, for one rank.

    layers: one entry per decoder layer. mtp: the draft head's own keys and values; its row j holds
    f(hidden j-1, token j), so row 0 is never written and never read.
    block_table: int32 [N, max_pages], 0 where no page is granted. fill: int32 [N], rows in the
    window. conv_offset: int32 [N].
    """

    layers: list[KVCache | GDNState]
    mtp: KVCache | None
    block_table: Tensor
    fill: Tensor
    conv_offset: Tensor
    page_size: int

    def kv_rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Flat KV row of each (slot, position); positions past the block table get the null page.

        slots, positions: int64, the same shape; the result has it too.
        """
        page = positions // self.page_size
        last = self.block_table.shape[1] - 1
        inside = page <= last
        pages = self.block_table[slots, page.clamp(max=last)].to(torch.int64)
        return torch.where(inside, pages, 0) * self.page_size + positions % self.page_size
