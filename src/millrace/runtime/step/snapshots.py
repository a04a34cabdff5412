"""The canonical record of a sequence at length L, and the pool that prefixes resume from.

A record is the recurrent state folded at L, the last three convolution inputs, and the hidden
vector of token L - 1 after the final norm (the draft head's row L needs it). With the KV pages it
is all that is needed to continue from L. It is saved and restored only while a slot's window is
empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.kernels.batch import Caches, GDNState
from millrace.kernels.copy import copy_rows

CONV_INPUTS = 3


@dataclass(slots=True)
class Snapshots:
    """M records. states, convs: [L, M, ...], of the L GDN layers as Caches has them.

    hidden: [M, H].
    """

    states: Tensor
    convs: Tensor
    hidden: Tensor

    @classmethod
    def allocate(
        cls, caches: Caches, count: int, hidden_size: int, dtype: torch.dtype
    ) -> Snapshots:
        states, convs = caches.states, caches.convs
        layers, channels = states.shape[0], convs.shape[3]
        return cls(
            states=states.new_empty(layers, count, *states.shape[2:]),
            convs=convs.new_empty(layers, count, CONV_INPUTS, channels),
            hidden=torch.empty(count, hidden_size, dtype=dtype, device=states.device),
        )

    def save(self, caches: Caches, slots: Tensor, records: Tensor, hidden: Tensor) -> None:
        """Copy slots (window empty, offset 0) into records.

        slots, records: int64 [R]; hidden: [R, H].
        """
        copy_rows(self.states, records, caches.states, slots)
        copy_rows(self.convs, records, caches.convs, slots)
        self.hidden[records] = hidden

    def restore(self, caches: Caches, slots: Tensor, records: Tensor) -> Tensor:
        """Copy records into slots, windows emptied. Returns the records' hidden vectors [R, H]."""
        copy_rows(caches.states, slots, self.states, records)
        copy_rows(caches.convs, slots, self.convs, records)
        empty_windows(caches, slots)
        return self.hidden[records]


def reset(caches: Caches, slots: Tensor) -> None:
    """Put slots (int64 [R]) at length 0: zero state and inputs, empty window."""
    caches.states.index_fill_(1, slots, 0)
    caches.convs.index_fill_(1, slots, 0)
    empty_windows(caches, slots)


def empty_windows(caches: Caches, slots: Tensor) -> None:
    """The form of a state after prefill: an empty window, the last inputs at offset 0."""
    caches.fill.index_fill_(0, slots, 0)
    caches.conv_offset.index_fill_(0, slots, 0)


def poison(caches: Caches, slots: Tensor) -> None:
    """Fill what a fresh slot must not read with NaN, so that reading it shows (debug mode)."""
    for layer in gdn_layers(caches):
        for buffer in (layer.window_k, layer.window_u, layer.window_g):
            buffer.index_fill_(0, slots, float("nan"))
        layer.conv[:, CONV_INPUTS:].index_fill_(0, slots, float("nan"))


def poison_pages(caches: Caches, pages: Tensor) -> None:
    """Fill newly granted pages (int64 [R]) with NaN (debug mode)."""
    for layer in [*caches.layers, caches.mtp]:
        if layer is None or isinstance(layer, GDNState):
            continue
        for buffer in (layer.keys, layer.values):
            if buffer.dtype == torch.float8_e4m3fn:
                buffer.view(torch.uint8).index_fill_(0, pages, 0x7F)  # NaN in e4m3fn
            else:
                buffer.index_fill_(0, pages, float("nan"))


def gdn_layers(caches: Caches) -> list[GDNState]:
    return [layer for layer in caches.layers if isinstance(layer, GDNState)]
