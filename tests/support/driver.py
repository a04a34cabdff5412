"""Drives a model step by step as the runtime does, one call a step, with NaN in all unused memory.

Memory that nobody may read is filled with NaN: the null page and null slot, pages and window rows
not written yet, the last page of each sequence past its end. Pages are dealt out in random order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from millrace.kernels.batch import (
    Batch,
    Caches,
    DecodeRows,
    GDNState,
    PrefillRows,
    SelectedTokens,
)
from millrace.model.cache_spec import CacheOptions
from millrace.model.causal_lm import CausalLM
from millrace.runtime.step.caches import allocate_caches as allocate_spec
from millrace.runtime.step.caches import tensors_of

NAN = float("nan")
Row = tuple[int, Sequence[int]]


def allocate_caches(
    model: CausalLM,
    slots: int,
    pages_per_slot: int,
    page_size: int = 4,
    drafts: int = 0,
    window: int = 16,
    kv_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype = torch.float32,
    ranks: int = 1,
    seed: int = 0,
) -> Caches:
    """Caches of `slots` live slots (1 ..), all of it NaN, with every slot's pages granted."""
    dtype = next(model.parameters()).dtype
    names = (str(d).removeprefix("torch.") for d in (dtype, kv_dtype or dtype, state_dtype))
    options = CacheOptions(
        *names, page_size, pages_per_slot, drafts, window, draft_head=model.mtp is not None
    )
    rows, pages = slots + 1, 1 + slots * pages_per_slot
    caches = allocate_spec(model.config.cache_spec(options), slots=rows, pages=pages, ranks=ranks)
    for tensor in tensors_of(caches):
        if tensor.is_floating_point():
            tensor.copy_(torch.full(tensor.shape, NAN).to(tensor.dtype))
    order = 1 + torch.randperm(pages - 1, generator=torch.Generator().manual_seed(seed))
    caches.block_table[1:] = order.view(slots, pages_per_slot).to(torch.int32)
    return caches


def make_batch(
    caches: Caches, lengths: Tensor, decode: Sequence[Row], prefill: Sequence[Row], padded: int = 0
) -> tuple[Tensor, Batch]:
    """Token ids and batch of one step. lengths: int64 [N], where each row starts.

    decode rows are of one width; `padded` rows on the null slot follow them.
    """
    width = len(decode[0][1]) if decode else 1
    decode = [*decode, *[(0, [0] * width)] * padded]
    slots, positions, ids = [], [], []
    for slot, tokens in [*decode, *prefill]:
        start = int(lengths[slot]) if slot else 0
        slots += [slot] * len(tokens)
        positions += range(start, start + len(tokens))
        ids += tokens
    token_slots, token_positions = torch.tensor(slots), torch.tensor(positions)
    return torch.tensor(ids), Batch(
        token_slots=token_slots,
        positions=token_positions,
        kv_rows=caches.kv_rows(token_slots, token_positions),
        decode=_decode_rows(decode, lengths, width) if decode else None,
        prefill=_prefill_rows(prefill, lengths) if prefill else None,
    )


def _decode_rows(rows: Sequence[Row], lengths: Tensor, width: int) -> DecodeRows:
    slots = torch.tensor([slot for slot, _ in rows])
    starts = torch.where(slots > 0, lengths[slots], 0)
    first = int(slots[0])
    neighbours = slots.tolist() == list(range(first, first + len(rows)))
    return DecodeRows(
        slots, starts, width, int(starts.max()) + width, first if neighbours else None
    )


def _prefill_rows(rows: Sequence[Row], lengths: Tensor) -> PrefillRows:
    slots = torch.tensor([slot for slot, _ in rows])
    counts = tuple(len(tokens) for _, tokens in rows)
    return PrefillRows(
        slots=slots,
        starts=lengths[slots],
        offsets=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        counts=counts,
        host_starts=tuple(lengths[slots].tolist()),
    )


def ask_for_ends(caches: Caches, batch: Batch) -> SelectedTokens:
    """All tokens of decode rows, and the last of each prefill row."""
    offsets = batch.prefill.offsets[1:].long() if batch.prefill else torch.zeros(0).long()
    verified = batch.num_decode_tokens
    tokens = torch.cat([torch.arange(verified), verified + offsets - 1])
    slots, positions = batch.token_slots[tokens], batch.positions[tokens]
    rows = DecodeRows(slots, positions, 1, batch.max_context)
    return SelectedTokens(tokens, Batch(slots, positions, batch.kv_rows[tokens], rows, None))


class Driver:
    """A model with its caches and the lengths that a runtime would keep."""

    def __init__(self, model: CausalLM, caches: Caches) -> None:
        self.model, self.caches = model, caches
        self.lengths = torch.zeros(caches.fill.shape[0], dtype=torch.int64)

    def admit(self, slot: int) -> None:
        """Start a sequence: its recurrent state and its convolution inputs become zero."""
        self.lengths[slot] = self.caches.fill[slot] = self.caches.conv_offset[slot] = 0
        for cache in self.caches.layers:
            if isinstance(cache, GDNState):
                cache.state[slot], cache.conv[slot] = 0.0, 0.0

    @torch.inference_mode()
    def step(
        self,
        decode: Sequence[Row] = (),
        prefill: Sequence[Row] = (),
        padded: int = 0,
        ends: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden [count, H] of each decode row and of each prefill row.

        Prefill rows are longer afterwards; decode rows only once `accept` says by how much. ends:
        of prefill rows only the last token is asked for.
        """
        ids, batch = make_batch(self.caches, self.lengths, decode, prefill, padded)
        asked = ask_for_ends(self.caches, batch) if ends else None
        hidden = self.model(ids, batch, self.caches, asked)
        for slot, tokens in prefill:
            self.lengths[slot] += len(tokens)
            self.caches.conv_offset[slot] = 0
        width = batch.decode.width if batch.decode else 0
        pieces = hidden.split(
            [width] * (len(decode) + padded) + [len(tokens) for _, tokens in prefill]
        )
        return list(pieces[: len(decode)]), list(pieces[len(decode) + padded :])

    def accept(self, slot: int, count: int, width: int) -> None:
        """Accept the first `count` of this decode row's `width` tokens of the last step."""
        windows = [c.window_u.shape[2] for c in self.caches.layers if isinstance(c, GDNState)]
        if windows:
            fill = int(self.caches.fill[slot])
            folded = fill + width > windows[0]
            self.caches.fill[slot] = (0 if folded else fill) + count
        self.caches.conv_offset[slot] = count - 1
        self.lengths[slot] += count
