"""The input of a forward pass besides token ids: positions of the tokens, and memory.

A `Batch` describes the rows of one step, `Caches` the device memory that outlives it. Both are
plain records: the runtime fills them, and the model passes them to the ops in `millrace.kernels`.

Conventions that every op keeps:

* Tokens of a step are flat, `T` of them: first the decode rows (each of the same `width`), then the
  prefill rows, one after another, then padding.
* Slot 0 and page 0 are null: padded rows use slot 0, whose block table is all zeros, so that
  nobody reads what they write. Padded rows have no tokens; what an op returns for padded tokens is
  undefined and never read, not even by other ops of another token.
* Lengths on the device are the truth. The host knows upper bounds only (`max_context`), and of a
  padded batch, which is what a CUDA graph runs on, not even how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

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
    _tables: dict[str, PrefillRows] = field(default_factory=dict, compare=False, repr=False)

    def fixed(self) -> FixedRows:
        """The same rows for batch invariant ops."""
        return FixedRows(self.slots, self.as_prompts().offsets, prompts=False)

    def as_prompts(self) -> PrefillRows:
        """The same rows as rows of any lengths, made once."""
        found = self._tables.get("prompts")
        if found is None:
            last, device = self.slots.shape[0] * self.width, self.slots.device
            offsets = torch.arange(0, last + 1, self.width, dtype=torch.int32, device=device)
            found = PrefillRows(self.slots, self.starts, offsets, None, None, self.max_context)
            self._tables["prompts"] = found
        return found

    def __post_init__(self) -> None:
        # Kernels read both as plain arrays and ignore strides.
        assert self.slots.is_contiguous()
        assert self.starts.is_contiguous()


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """Rows of prompt tokens, of any lengths.

    slots: int64 [P]. starts: int64 [P]. offsets: int32 [P + 1], the tokens of the batch that the
    rows begin with, and where the last one ends. counts and host_starts: the lengths and starts as
    host integers; None where only the device knows them, and rows of no tokens may come last; no
    row is longer than `bound` then.
    """

    slots: Tensor
    starts: Tensor
    offsets: Tensor
    counts: tuple[int, ...] | None
    host_starts: tuple[int, ...] | None
    bound: int = 0
    _tables: dict[object, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        assert self.slots.is_contiguous()
        assert self.starts.is_contiguous()

    @property
    def host_counts(self) -> tuple[int, ...]:
        """The lengths, for ops of the host, whose batches are never padded."""
        assert self.counts is not None
        return self.counts

    @property
    def max_context(self) -> int:
        if self.counts is None or self.host_starts is None:
            return self.bound
        return max(s + c for s, c in zip(self.host_starts, self.counts, strict=True))

    def fixed(self) -> FixedRows:
        """The same rows, where no tokens come before them."""
        return FixedRows(self.slots, self.offsets, prompts=True)

    def alone(self) -> PrefillRows:
        """The same rows where no tokens come before them."""
        return replace(self, offsets=self.offsets - self.offsets[0], _tables={})

    def tiles(self, size: int, tokens: int) -> Tensor:
        """The rows cut into tiles of `size` tokens: int32 [2, n], row and number of each tile.

        tokens: T of the batch. The row is -1 for what is left of n, a bound that holds for any
        lengths. Made once for each size.
        """
        return self.kept(("tiles", size), lambda: _tiles(self.offsets, size, tokens))

    def places(self, tokens: int) -> Tensor:
        """int32 [T]: each token's place in its prefill row, -1 for the others."""
        return self.kept("places", lambda: _places(self.offsets, tokens))

    def token_slots(self, tokens: int) -> Tensor:
        """int64 [T]: each token's slot, 0 for those outside the prefill rows."""
        return self.kept("slots", lambda: _token_slots(self, tokens))

    def live(self) -> Tensor:
        """int32 [1]: how many rows have tokens; they come first."""
        return self.kept("live", lambda: (self.offsets.diff() > 0).sum(0, True).to(torch.int32))

    def kept(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes of these rows, made once."""
        found = self._tables.get(key)
        if found is None:
            found = self._tables[key] = make()
        return found


@dataclass(frozen=True, slots=True)
class FixedRows:
    """Rows of tokens for ops that are batch invariant, be they of prompts or of drafts.

    slots: int64 [R]. offsets: int32 [R + 1], the tokens that the rows begin with, and where the
    last one ends. prompts: all of a row's tokens count; else those behind the end of its window do
    not.
    """

    slots: Tensor
    offsets: Tensor
    prompts: bool


def _tiles(offsets: Tensor, size: int, tokens: int) -> Tensor:
    rows = offsets.shape[0] - 1
    tiles = (offsets.diff() + (size - 1)) // size
    ends = tiles.cumsum(0, dtype=torch.int32)
    number = torch.arange(tokens // size + rows, dtype=torch.int32, device=offsets.device)
    row = torch.searchsorted(ends, number, right=True, out_int32=True)
    inside = row < rows
    first = (ends - tiles)[row.clamp(max=rows - 1)]
    return torch.stack([torch.where(inside, row, -1), number - first])


def _row_of(offsets: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """int32 [T]: the tokens' numbers, and the row of each; bool [T]: whether it is in one."""
    rows = offsets.shape[0] - 1
    token = torch.arange(tokens, dtype=torch.int32, device=offsets.device)
    row = torch.searchsorted(offsets, token, right=True, out_int32=True) - 1
    return token, row.clamp(0, rows - 1), (row >= 0) & (row < rows)


def _places(offsets: Tensor, tokens: int) -> Tensor:
    token, row, inside = _row_of(offsets, tokens)
    return torch.where(inside, token - offsets[row], -1)


def _token_slots(rows: PrefillRows, tokens: int) -> Tensor:
    _, row, inside = _row_of(rows.offsets, tokens)
    return torch.where(inside, rows.slots[row], 0)


@dataclass(frozen=True, slots=True)
class Batch:
    """The T tokens of one forward.

    token_slots: int64 [T]. positions: int64 [T], position of each token in its sequence. kv_rows:
    int64 [T], the flat row (page * page_size + offset) for each token's keys and values.
    decode and prefill may both be None if only keys and values are written.
    padded: rows and tokens may be padding; how many are not only the device knows.
    """

    token_slots: Tensor
    positions: Tensor
    kv_rows: Tensor
    decode: DecodeRows | None
    prefill: PrefillRows | None
    padded: bool = False

    @property
    def max_context(self) -> int:
        """An upper bound of every token's position + 1."""
        return max(part.max_context for part in (self.decode, self.prefill) if part)

    @property
    def num_decode_tokens(self) -> int:
        """Of a batch that is not padded."""
        assert not self.padded
        return 0 if self.decode is None else self.decode.slots.shape[0] * self.decode.width

    def as_prompts(self) -> list[tuple[PrefillRows, bool]]:
        """Its rows as rows of any lengths, and whether they are of prompts."""
        decode = [] if self.decode is None else [(self.decode.as_prompts(), False)]
        return decode if self.prefill is None else [*decode, (self.prefill, True)]

    def trimmed(self) -> Batch:
        """Without padding, for ops of the host; reads the device's tables."""
        if not self.padded:
            return self
        decode, prefill, tokens = self.decode, self.prefill, 0
        if decode is not None:
            count = _decode_rows(decode, self.prefill)
            tokens = count * decode.width
            slots, starts = decode.slots[:count], decode.starts[:count]
            cut = replace(decode, slots=slots, starts=starts, _tables={})
            decode = cut if count else None
        if prefill is not None:
            count = int(prefill.live())
            offsets = prefill.offsets[: count + 1]
            tokens = int(offsets[-1])
            slots, starts = prefill.slots[:count], prefill.starts[:count]
            known = tuple(offsets.diff().tolist()), tuple(starts.tolist())
            prefill = PrefillRows(slots, starts, offsets, *known) if count else None
        slots, positions = self.token_slots[:tokens], self.positions[:tokens]
        return Batch(slots, positions, self.kv_rows[:tokens], decode, prefill)


def _decode_rows(decode: DecodeRows, prefill: PrefillRows | None) -> int:
    """How many rows have tokens; those that have ended have slot 0, and padding comes last. At
    least one, of the null slot where all have ended, so that ops always have a row."""
    if prefill is not None:
        return int(prefill.offsets[0]) // decode.width
    live = decode.slots.nonzero()
    return int(live[-1]) + 1 if live.shape[0] else 1


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

    layers: one entry per decoder layer. stacks: by field name, [L, N, ...], the memory in which the
    fields of L layers lie, in their order, that the record of a prefix keeps (`state` and `conv` of
    the GDN layers); windows: the same of those that it does not keep. kv: the memory in which all
    keys and values lie, [2 L, pages, ...] for each form that they have. mtp: the draft head's own
    keys and values; its row j holds f(hidden j-1, token j), so row 0 is never written and never
    read.
    block_table: int32 [N, max_pages], 0 where no page is granted. fill: int32 [N], rows in the
    window. conv_offset: int32 [N]. draft_layers: keys and values of a draft model.
    """

    layers: list[KVCache | GDNState]
    stacks: dict[str, Tensor]
    windows: dict[str, Tensor]
    kv: list[Tensor]
    mtp: KVCache | None
    block_table: Tensor
    fill: Tensor
    conv_offset: Tensor
    page_size: int
    draft_layers: list[KVCache] = field(default_factory=list)

    def kv_rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Flat KV row of each (slot, position); positions past the block table get the null page.

        slots, positions: int64, the same shape; the result has it too.
        """
        page = positions // self.page_size
        last = self.block_table.shape[1] - 1
        inside = page <= last
        pages = self.block_table[slots, page.clamp(max=last)].to(torch.int64)
        return torch.where(inside, pages, 0) * self.page_size + positions % self.page_size
