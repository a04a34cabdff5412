"""Cached prefixes in the host's memory: copies of pages and snapshots, at places that plans name.

Of a range of pages, all layers of the first page lie together, then all of the next. On a GPU the
memory is pinned, and copies run on a stream of their own: behind all steps that are launched,
beside those that come. A copy goes in pieces of some pages for all layers at once, so that it takes
few launches and little memory of the device. What is where is not known here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from millrace.kernels.batch import Caches
from millrace.protocol import Move
from millrace.runtime.step.snapshots import Snapshots
from millrace.runtime.step.upload import upload
from millrace.runtime.tiers.pinned import pinned_memory, unpin
from millrace.runtime.transfer.device_memory import allocate, free
from millrace.runtime.transfer.device_wait import comes_within
from millrace.runtime.transfer.layout import RecordLayout
from millrace.runtime.transfer.shared_memory import mapped, new_file

PIECE = 64 << 20  # bytes of pages that are copied at once
CLOSE_SECONDS = 10.0


class HostCache:
    """`size` bytes, and the device memory that is copied from and to.

    shared: other engines of this host may read the memory; `descriptor` is that of its file then,
    else -1. on_device: it is the GPU's own, which others read by CUDA IPC. layout: of the bytes of
    a record in it.
    """

    def __init__(
        self,
        size: int,
        caches: Caches,
        snapshots: Snapshots,
        shared: bool = False,
        on_device: bool = False,
    ) -> None:
        # By page, all layers: [pages, L, ...].
        self._pages = [_words(stack).transpose(0, 1) for stack in caches.kv]
        self._device = caches.block_table.device
        on_gpu = self._device.type == "cuda"
        self.descriptor = new_file(size) if shared and not on_device else -1
        self.memory = allocate(size, self._device) if on_device else self._allocate(size, on_gpu)
        self._stream = torch.cuda.Stream() if on_gpu else None
        # By snapshot, the parts of a record: [M, L, ...] or [M, ...].
        self._states = [stack.transpose(0, 1) for stack in snapshots.stacks.values()]
        if snapshots.hidden is not None:
            self._states.append(snapshots.hidden)
        self.layout = RecordLayout(
            tuple(_row_bytes(stack) for stack in self._pages),
            sum(_row_bytes(states) for states in self._states),
        )

    def _allocate(self, size: int, on_gpu: bool) -> Tensor:
        if on_gpu:
            return pinned_memory(size, self.descriptor)
        if self.descriptor < 0:
            return torch.empty(size, dtype=torch.uint8)
        return torch.frombuffer(mapped(self.descriptor, size), dtype=torch.uint8)

    def offload(self, moves: list[Move]) -> torch.cuda.Event | None:
        """Copy from the device. Returns what says that it is done; None: it is."""
        with self._beside():
            for move in moves:
                self._copy(move, to_device=False)
            return self._mark()

    def load(self, moves: list[Move]) -> torch.cuda.Event | None:
        """Copy to the device."""
        with self._beside():
            for move in moves:
                self._copy(move, to_device=True)
            return self._mark()

    def wait(self) -> None:
        """Steps that are launched from now on wait for the copies that have begun."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def mark(self) -> torch.cuda.Event | None:
        """What says that the copies that have begun are done; None: they are."""
        with self._beside():
            return self._mark()

    def close(self) -> None:
        """Wait for the copies, and give the memory back. A device that does not answer in time
        keeps it until the process ends."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        if self._stream is None:
            return
        if not comes_within(self._stream, CLOSE_SECONDS):
            return
        if self.memory.is_cuda:
            free(self.memory)
        else:
            unpin(self.memory)

    def _beside(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def _mark(self) -> torch.cuda.Event | None:
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _copy(self, move: Move, to_device: bool) -> None:
        at = move.pages_at
        for stack in self._pages if move.pages else []:
            there = self._view(at, stack, move.count)
            part = there[move.first : move.first + len(move.pages)]
            for pages, piece in self._pieces(move.pages, part):
                if to_device:
                    stack[pages] = piece.to(self._device, non_blocking=True)
                else:
                    piece.copy_(stack[pages].contiguous(), non_blocking=True)
            at += there.nbytes
        at = move.state_at
        for states in self._states if move.snapshot >= 0 else []:
            [part] = self._view(at, states, 1)
            if to_device:
                states[move.snapshot].copy_(part.to(self._device, non_blocking=True))
            else:
                part.copy_(states[move.snapshot].contiguous(), non_blocking=True)
            at += part.nbytes

    def _pieces(self, pages: list[int], part: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers of pages, and where each of them is in the host's memory, a few at a time."""
        most = max(1, PIECE // max(1, part[0].nbytes))
        numbers = upload(pages, self._device)
        for start in range(0, len(pages), most):
            yield numbers[start : start + most], part[start : start + most]

    def _view(self, at: int, like: Tensor, count: int) -> Tensor:
        """Memory from `at` on, as `count` rows of `like`."""
        size = count * _row_bytes(like)
        return self.memory[at : at + size].view(like.dtype).view(count, *like.shape[1:])


def _row_bytes(stack: Tensor) -> int:
    """Bytes of one of its rows."""
    return stack[0].numel() * stack.element_size() if len(stack) else 0


def _words(stack: Tensor) -> Tensor:
    """The same memory as numbers of 8 bytes, which are copied faster, or as bytes."""
    whole = stack.shape[-1] * stack.element_size() % 8 == 0
    return stack.view(torch.int64 if whole else torch.uint8)
