"""How a rank's record is made of tensors, so that other numbers of ranks can cut theirs out of it.

The order of the bytes is that of `layout`: of each kind of pages all pages, each with all layers;
then the tensors of the state, likewise. Which entries of an axis a rank has is said by the model's
`CacheSpec`. Nothing is known here of where the bytes come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.model.cache_spec import DTYPE_BYTES, Buffer, CacheSpec, Ranges
from millrace.runtime.transfer.layout import RecordLayout


@dataclass(frozen=True, slots=True)
class Block:
    """Buffers of one form of `layers` layers, which lie together."""

    buffer: Buffer
    layers: int

    def shape(self, ranks: int) -> tuple[int, ...]:
        """With a last axis of bytes."""
        item = DTYPE_BYTES[self.buffer.dtype]
        return self.layers, *self.buffer.recorded_shape(ranks), item

    def bytes(self, ranks: int) -> int:
        return math.prod(self.shape(ranks))

    def split(self, rank: int, ranks: int) -> list[Ranges]:
        """For each axis, the entries that a rank has; empty: all of them."""
        axes = self.buffer.axes
        return [axis.share(rank, ranks) if axis.split else () for axis in axes]


@dataclass(frozen=True, slots=True)
class RecordForm:
    """See the module. pages: blocks that each page has; state: the others."""

    pages: tuple[Block, ...]
    state: tuple[Block, ...]

    @classmethod
    def of(cls, spec: CacheSpec) -> RecordForm:
        pages = tuple(Block(buffer, count) for buffer, count in spec.page_forms().values())
        state = [Block(same[0], len(same)) for same in spec.stacks().values()]
        if spec.hidden is not None:
            state.append(Block(spec.hidden, 1))
        return cls(pages, tuple(state))

    def layout(self, ranks: int) -> RecordLayout:
        """Of one rank's record."""
        state = sum(block.bytes(ranks) for block in self.state)
        return RecordLayout(tuple(block.bytes(ranks) for block in self.pages), state)

    def cut(
        self, sources: Mapping[int, Tensor], there: int, rank: int, here: int, pages: int
    ) -> Tensor:
        """The record of one of `here` ranks, out of those of some of `there` ranks that have all of
        it. sources: by rank, uint8. pages: how many each has; without a state if it ends there."""
        layout = self.layout(here)
        whole = pages * sum(layout.page_bytes)
        most = pages * sum(self.layout(there).page_bytes)
        state = any(len(data) > most for data in sources.values())
        device = next(iter(sources.values())).device
        size = whole + state * layout.state_bytes
        found = torch.empty(size, dtype=torch.uint8, device=device)
        targets = list(self._views(found, here, pages, state))
        for source, data in sources.items():
            views = self._views(data, there, pages, state)
            for (block, target), (_, view) in zip(targets, views, strict=True):
                _copy_common(target, block.split(rank, here), view, block.split(source, there))
        return found

    def _views(
        self, data: Tensor, ranks: int, pages: int, state: bool
    ) -> Iterator[tuple[Block, Tensor]]:
        """Each block with its bytes: [pages, L, ..., bytes], or [1, L, ..., bytes]."""
        at = 0
        for count, blocks in ((pages, self.pages), (1, self.state if state else ())):
            for block in blocks:
                size = count * block.bytes(ranks)
                yield block, data[at : at + size].view(count, *block.shape(ranks))
                at += size


def sources_of(rank: int, here: int, there: int) -> list[int]:
    """The ranks of another engine whose records have all that one of `here` ranks needs."""
    if there >= here:
        each = there // here
        return list(range(rank * each, (rank + 1) * each))
    return [rank * there // here]


def _copy_common(target: Tensor, to: list[Ranges], source: Tensor, out_of: list[Ranges]) -> None:
    """Copy what both have of the whole model. to, out_of: for each axis behind the first two."""
    for axis, (mine, theirs) in enumerate(zip(to, out_of, strict=True), start=2):
        if mine == theirs:
            continue
        at = {entry: place for place, entry in enumerate(_entries(theirs))}
        common = [(place, at[e]) for place, e in enumerate(_entries(mine)) if e in at]
        if not common:
            return
        places, entries = torch.tensor(common, device=target.device).unbind(1)
        target.index_copy_(axis, places, source.index_select(axis, entries))
        return  # no buffer is divided along two axes
    target.copy_(source)


def _entries(ranges: Ranges) -> list[int]:
    return [entry for first, end in ranges for entry in range(first, end)]
