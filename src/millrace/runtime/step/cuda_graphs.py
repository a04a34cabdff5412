"""CUDA graphs of the decode step, one for each number of rows that is run often enough to matter.

A step of decode rows only depends on nothing but which slots run: lengths, tokens, windows and
drafts are all on the device. So the whole step, drafts included, is one graph whose only input is a
list of slots; rows beyond the ones asked for run on the null slot.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from millrace.runtime.step.upload import upload

NULL_SLOT = 0


@dataclass(slots=True)
class _Captured:
    """A graph with its input (slots int64 [rows]) and its output."""

    graph: torch.cuda.CUDAGraph
    slots: Tensor
    out: Tensor


class DecodeGraphs:
    """Captures `step` for each bucket of rows, and replays it.

    step: (slots int64 [rows], filters) -> the step's result [rows, ...], without host or sync.
    settle: waits for the device, and not for ranks that are gone.
    """

    def __init__(
        self,
        step: Callable[[Tensor, bool], Tensor],
        max_rows: int,
        device: torch.device,
        settle: Callable[[], None],
    ) -> None:
        self._step = step
        self._settle = settle
        self._device = device
        self._buckets = bucket_sizes(max_rows)
        self._captured: dict[tuple[int, bool], _Captured] = {}
        self._pool: Any = None  # the memory that all graphs share

    def capture_all(self) -> None:
        """Capture every bucket, largest first, so that the others fit into its memory."""
        for rows in reversed(self._buckets):
            self._get(rows, filters=False)

    def capture_largest(self, filters: bool) -> None:
        self._get(self._buckets[-1], filters)

    def run(self, slots: list[int], filters: bool) -> Tensor:
        """The result of a step over `slots`: [len(slots), ...]. Valid until the next run."""
        rows = self._buckets[bisect_left(self._buckets, len(slots))]
        captured = self._get(rows, filters)
        padded = slots + [NULL_SLOT] * (rows - len(slots))
        captured.slots.copy_(upload(padded, self._device))
        captured.graph.replay()
        return captured.out[: len(slots)]

    def _get(self, rows: int, filters: bool) -> _Captured:
        found = self._captured.get((rows, filters))
        if found is None:
            found = self._captured[rows, filters] = self._capture(rows, filters)
        return found

    def _capture(self, rows: int, filters: bool) -> _Captured:
        slots = torch.full((rows,), NULL_SLOT, dtype=torch.int64, device=self._device)
        self._step(slots, filters)  # compiles and tunes what is used for the first time
        self._settle()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's, may query events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = self._step(slots, filters)
        self._pool = self._pool or graph.pool()
        return _Captured(graph, slots, out)


def bucket_sizes(max_rows: int) -> list[int]:
    """Row counts worth a graph each: finely spaced where few run, by 32 where many do."""
    sizes = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]
    sizes += range(96, max_rows, 32)
    return [*(size for size in sizes if size < max_rows), max_rows]
