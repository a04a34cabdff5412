"""The ranks of one replica: how they find each other, and how a plan reaches them.

Rank 0 schedules and sends each plan; every rank runs it and takes part in the tensor collectives.
Plans are msgpack bytes over a Gloo group of their own, so that waiting for the next plan has no
limit while a collective inside a step has one.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from millrace.errors import ConfigError
from millrace.protocol import StepPlan, StopRanks, ToRank

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ToRank).decode

STEP_LIMIT = timedelta(seconds=120)
PLAN_LIMIT = timedelta(days=365)


@dataclass(slots=True)
class Ranks:
    """This process's place among `size` ranks, and their groups (None alone)."""

    rank: int = 0
    size: int = 1
    tensors: dist.ProcessGroup | None = None
    plans: dist.ProcessGroup | None = None

    @classmethod
    def join(cls, rank: int, size: int, backend: str) -> Ranks:
        """Meet the other ranks at MASTER_ADDR:MASTER_PORT. backend: gloo, or nccl on GPUs."""
        if size == 1:
            return cls()
        dist.init_process_group(
            backend, init_method="env://", rank=rank, world_size=size, timeout=STEP_LIMIT
        )
        plans = dist.new_group(backend="gloo", timeout=PLAN_LIMIT)
        return cls(rank, size, dist.group.WORLD, plans)

    def send(self, message: ToRank) -> None:
        """Rank 0: send a message to every other rank."""
        if self.size == 1:
            return
        data = torch.frombuffer(bytearray(_encode(message)), dtype=torch.uint8)
        dist.broadcast(torch.tensor([data.numel()]), src=0, group=self.plans)
        dist.broadcast(data, src=0, group=self.plans)

    def receive(self) -> StepPlan | StopRanks:
        """Other ranks: wait for the next message of rank 0."""
        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, src=0, group=self.plans)
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, src=0, group=self.plans)
        message: StepPlan | StopRanks = _decode(data.numpy().tobytes())
        return message

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place; the same bits on every rank."""
        dist.all_reduce(x, group=self.tensors)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's x [..., n] side by side in rank order: [..., size * n]."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.tensors)
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x on every rank, so that none goes its own way by a rounding."""
        if self.size == 1:
            return x
        dist.broadcast(x, src=0, group=self.tensors)
        return x

    def leave(self) -> None:
        """Part from the other ranks; no collective may follow.

        The groups are dropped here, not at the interpreter's end: dropping one joins Gloo's
        threads, and a thread that frees its last tensor while Python is being torn down aborts
        the process.
        """
        if self.size > 1 and dist.is_initialized():
            self.tensors = self.plans = None
            dist.destroy_process_group()


def launched_by_torchrun() -> bool:
    """Whether RANK and WORLD_SIZE name this process's place already."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def place(tensor_parallel_size: int) -> tuple[int, int]:
    """(rank, size) under torchrun. Raises ConfigError where flag and launcher disagree."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if tensor_parallel_size not in (1, size):
        raise ConfigError(
            f"tensor_parallel_size {tensor_parallel_size}, but torchrun started {size} processes; "
            f"leave it out or give {size}"
        )
    return rank, size


def free_port() -> int:
    """A TCP port on the loopback interface that nobody uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
