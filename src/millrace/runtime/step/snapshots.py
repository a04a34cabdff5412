"""The canonical record of a sequence at length L, and the pool that prefixes resume from.

What is in a record is said by the model's `CacheSpec`: of a hybrid model the recurrent state folded
at L and the last three convolution inputs, with a draft head also the hidden vector of token L - 1
after the final norm (the draft head's row L needs it). With the KV pages it is all that is needed
to continue from L. A slot is restored with an empty window. While it has rows in its window, these
are folded into the record as it is saved. Where windows begin at fixed positions, a record has them
instead, and how full they are follows from L.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.kernels.batch import Caches, GDNState
from millrace.kernels.copy import copy_rows
from millrace.kernels.gdn import Window, as_stored, fold
from millrace.model.cache_spec import CONV_INPUTS, CacheSpec
from millrace.runtime.step.caches import DTYPES

FOLDED_BYTES = 64 << 20  # of states that are folded at once


@dataclass(slots=True)
class Snapshots:
    """M records. stacks: [L, M, ...] for each of `Caches.stacks`, the part that a record keeps.

    hidden: [M, H]; None without a draft head.
    """

    count: int
    stacks: dict[str, Tensor]
    hidden: Tensor | None

    @classmethod
    def allocate(
        cls, spec: CacheSpec, count: int, ranks: int = 1, device: torch.device | str = "cpu"
    ) -> Snapshots:
        """`count` records without content."""

        def empty(dtype: str, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=DTYPES[dtype], device=device)

        stacks = {
            name: empty(same[0].dtype, len(same), count, *same[0].recorded_shape(ranks))
            for name, same in spec.stacks().items()
        }
        hidden = spec.hidden
        vectors = None if hidden is None else empty(hidden.dtype, count, *hidden.shape(ranks))
        return cls(count, stacks, vectors)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.stacks.values()
        if self.hidden is not None:
            yield self.hidden

    def save(self, caches: Caches, slots: Tensor, records: Tensor, hidden: Tensor) -> None:
        """Copy slots (window empty, offset 0) into records.

        slots, records: int64 [R]; hidden: [R, H].
        """
        for name, stack in self.stacks.items():
            copy_rows(stack, records, caches.stacks[name], slots)
        if self.hidden is not None:
            self.hidden[records] = hidden

    def save_open(self, caches: Caches, slot: int, record: int, hidden: Tensor | None) -> None:
        """Copy a slot, with all rows of its window, into a record; the slot stays as it is.

        hidden: [H], of the slot's last computed token; None without a draft head.
        """
        for name, stack in self.stacks.items():
            if name == "state" and caches.windows:
                self._save_state(caches, slot, record)
            elif name == "conv":
                offset = caches.conv_offset[slot].to(torch.int64)
                inputs = offset + torch.arange(CONV_INPUTS, device=offset.device)
                stack[:, record] = caches.stacks[name][:, slot].index_select(1, inputs)
            else:
                stack[:, record] = caches.stacks[name][:, slot]
        if self.hidden is not None and hidden is not None:
            self.hidden[record] = hidden

    def _save_state(self, caches: Caches, slot: int, record: int) -> None:
        """Fold the windows of a few layers at a time."""
        states, windows = caches.stacks["state"], caches.windows
        layers = max(1, FOLDED_BYTES // (4 * states[0, 0].numel()))
        for first in range(0, states.shape[0], layers):
            some = slice(first, first + layers)
            state = states[some, slot].to(torch.float32, copy=True)
            k, u, log_a = (
                windows[name][some, slot].float() for name in ("window_k", "window_u", "window_g")
            )
            fill = caches.fill[slot].to(torch.int64).expand(state.shape[0])
            folded = fold(state, Window(k, u, log_a, fill))
            self.stacks["state"][some, record] = as_stored(folded, states.dtype)

    def restore(self, caches: Caches, slots: Tensor, records: Tensor) -> Tensor | None:
        """Copy records into slots, windows emptied. Returns the records' hidden vectors [R, H]."""
        for name, stack in self.stacks.items():
            copy_rows(caches.stacks[name], slots, stack, records)
        empty_windows(caches, slots)
        return None if self.hidden is None else self.hidden[records]


def reset(caches: Caches, slots: Tensor) -> None:
    """Put slots (int64 [R]) at length 0: zero state and inputs, empty window."""
    for stack in caches.stacks.values():
        stack.index_fill_(1, slots, 0)
    empty_windows(caches, slots)


def empty_windows(caches: Caches, slots: Tensor) -> None:
    """The form of a state after prefill: an empty window, the last inputs at offset 0."""
    caches.fill.index_fill_(0, slots, 0)
    caches.conv_offset.index_fill_(0, slots, 0)


def fixed_fill(lengths: Tensor, window: int) -> Tensor:
    """int32: rows in the windows of sequences of these lengths, where windows begin at multiples of
    their rows: a full one is folded before the next token, not sooner."""
    return torch.where(lengths > 0, (lengths - 1) % window + 1, 0).to(torch.int32)


def copy_pages(caches: Caches, sources: Tensor, targets: Tensor) -> None:
    """Copy keys and values of pages (int64 [R]) over other pages, in every layer."""
    for stack in caches.kv:
        raw = stack.view(torch.uint8) if stack.dtype == torch.float8_e4m3fn else stack
        raw[:, targets] = raw[:, sources]


def poison(caches: Caches, slots: Tensor) -> None:
    """Fill what a fresh slot must not read with NaN, so that reading it shows (debug mode)."""
    for layer in gdn_layers(caches):
        for buffer in (layer.window_k, layer.window_u, layer.window_g):
            buffer.index_fill_(0, slots, float("nan"))
        layer.conv[:, CONV_INPUTS:].index_fill_(0, slots, float("nan"))


def poison_pages(caches: Caches, pages: Tensor) -> None:
    """Fill newly granted pages (int64 [R]) with NaN (debug mode)."""
    for stack in caches.kv:
        if stack.dtype == torch.float8_e4m3fn:
            stack.view(torch.uint8).index_fill_(1, pages, 0x7F)  # NaN in e4m3fn
        else:
            stack.index_fill_(1, pages, float("nan"))


def gdn_layers(caches: Caches) -> list[GDNState]:
    return [layer for layer in caches.layers if isinstance(layer, GDNState)]
