"""Cached prefixes in the host's memory: copies of pages and snapshots, at places that plans name.

Of a range of pages each layer's keys lie together, then its values, then the next layer's. On a GPU
the memory is pinned, and copies run on a stream of their own: behind all steps that are launched,
beside those that come. What is where is not known here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from millrace.kernels.batch import Caches
from millrace.protocol import Move
from millrace.runtime.step.snapshots import Snapshots, kv_buffers
from millrace.runtime.step.upload import upload


class HostCache:
    """`size` bytes, and the device memory that is copied from and to."""

    def __init__(self, size: int, caches: Caches, snapshots: Snapshots) -> None:
        self._buffers = [_raw(buffer) for buffer in kv_buffers(caches)]
        self._device = self._buffers[0].device
        on_gpu = self._device.type == "cuda"
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        self._stream = torch.cuda.Stream() if on_gpu else None
        # By snapshot, the parts of a record: [M, L, ...] or [M, ...].
        self._states = [stack.transpose(0, 1) for stack in snapshots.stacks.values()]
        if snapshots.hidden is not None:
            self._states.append(snapshots.hidden)

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
        pages = upload(move.pages, self._device)
        at = move.pages_at
        for buffer in self._buffers if move.pages else []:
            whole = self._view(at, buffer, move.count)
            part = whole[move.first : move.first + len(move.pages)]
            if to_device:
                buffer[pages] = part.to(self._device, non_blocking=True)
            else:
                part.copy_(buffer[pages], non_blocking=True)
            at += whole.nbytes
        at = move.state_at
        for states in self._states if move.snapshot >= 0 else []:
            [part] = self._view(at, states, 1)
            if to_device:
                states[move.snapshot].copy_(part.to(self._device, non_blocking=True))
            else:
                part.copy_(states[move.snapshot].contiguous(), non_blocking=True)
            at += part.nbytes

    def _view(self, at: int, like: Tensor, count: int) -> Tensor:
        """Memory from `at` on, as `count` rows of `like`."""
        size = count * like[0].numel() * like.element_size()
        return self.memory[at : at + size].view(like.dtype).view(count, *like.shape[1:])


def _raw(buffer: Tensor) -> Tensor:
    """FP8 as bytes: not all operations know it."""
    return buffer.view(torch.uint8) if buffer.dtype == torch.float8_e4m3fn else buffer
