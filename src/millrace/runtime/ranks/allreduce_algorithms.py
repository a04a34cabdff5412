"""The ways to add up a tensor over the ranks: what each needs, and what it takes.

Which one is right and fastest is measured elsewhere (`allreduce.py`). MILLRACE_SKIP_ALL_REDUCE
names ways to leave alone, with commas between, where one hangs or harms.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from millrace.errors import RankError
from millrace.model.parallel import Normed
from millrace.runtime.ranks.interruptible import ended_after
from millrace.runtime.ranks.ranks import Ranks

log = logging.getLogger("millrace.ranks")

PEER_ROWS = 512  # tokens of a message, at most, that goes through peer memory of ours
PEER_BYTES = 8 << 20  # of a message, at most, that goes through the library's
TRIAL_POLLS = 1 << 21  # about two seconds: a flag that does not come then never will
SET_UP_LIMIT = 60.0  # seconds for a way to be set up
MAPPING_LIMIT = 20.0  # seconds for ranks to map each other's memory once all are there
SKIP = "MILLRACE_SKIP_ALL_REDUCE"


class Algorithm(Protocol):
    """A way to add up. Called on every rank alike."""

    @property
    def name(self) -> str:
        """What the table and the log call it."""

    def takes(self, x: Tensor) -> bool:
        """Whether it can add up a message like x, [T, H]."""

    def __call__(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in x or in a tensor of its own; x is not needed any more."""


@dataclass(frozen=True, slots=True)
class GroupSum:
    """The library's own all-reduce: Gloo between hosts' memories, NCCL between GPUs."""

    ranks: Ranks
    name: str

    def takes(self, x: Tensor) -> bool:
        return True

    def __call__(self, x: Tensor) -> Tensor:
        return self.ranks.all_reduce(x)


@dataclass(frozen=True, slots=True)
class GatherSum:
    """Everybody's part to everybody, added up in rank order: one exchange where a ring needs more,
    at the price of more bytes."""

    ranks: Ranks
    name: str

    def takes(self, x: Tensor) -> bool:
        return x.nbytes * self.ranks.size <= PEER_BYTES

    def __call__(self, x: Tensor) -> Tensor:
        first, *others = self.ranks.gather_parts(x)
        for other in others:
            first += other
        return first


class LibraryPeers:
    """PyTorch's one-shot or two-shot kernel over symmetric memory, without multicast."""

    def __init__(self, ranks: Ranks, name: str, dtype: torch.dtype, two_shot: bool) -> None:
        self.name = name
        self._two_shot = two_shot
        self._group = ranks.tensors.group_name
        (self._buffer,), _ = _shared(ranks, (PEER_BYTES // dtype.itemsize, dtype))

    def takes(self, x: Tensor) -> bool:
        return x.is_cuda and x.numel() <= self._buffer.numel() and x.dtype == self._buffer.dtype

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        ops, buffer = torch.ops.symm_mem, self._buffer[: x.numel()].view(x.shape)
        if self._two_shot:
            buffer.copy_(x)
            ops.two_shot_all_reduce_out(buffer, "sum", self._group, x)
            return x
        out: Tensor = ops.one_shot_all_reduce_copy(buffer, x, "sum", self._group)
        return out


class OwnPeers:
    """Our one-shot kernel over symmetric memory; it can go on to the residual add and the norm."""

    def __init__(self, ranks: Ranks, name: str, dtype: torch.dtype, width: int) -> None:
        from millrace.kernels.gpu.all_reduce import PeerMemory

        self.name = name
        self._dtype = dtype
        values, flags = (2 * PEER_ROWS * width, dtype), (PEER_ROWS * ranks.size, torch.int32)
        shared, handles = _shared(ranks, values, flags)
        addresses = [
            torch.tensor([p + getattr(h, "offset", 0) for p in h.buffer_ptrs], device="cuda")
            for h in handles
        ]
        calls = torch.zeros(PEER_ROWS, dtype=torch.int32, device="cuda")
        buffers, counts = addresses
        self.memory = PeerMemory(
            *(ranks.rank, ranks.size, PEER_ROWS, width),
            *(buffers, counts, calls),
            keep=(shared, handles),
            patience=TRIAL_POLLS,
        )

    def trust(self) -> None:
        """It has been found right: from now on wait for the other ranks as long as it takes."""
        from millrace.kernels.gpu.all_reduce import EVER

        self.memory.patience = EVER

    def takes(self, x: Tensor) -> bool:
        return x.is_cuda and x.dtype == self._dtype and self.memory.takes(x)

    def __call__(self, x: Tensor) -> Tensor:
        from millrace.kernels.gpu.all_reduce import one_shot

        return one_shot(x, self.memory)

    def norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, keep: bool, quantized: bool
    ) -> Normed:
        """(rms_norm(s), its quantised form, s) for s = the sum of x over the ranks + residual."""
        from millrace.kernels.gpu.all_reduce import one_shot_norm

        memory = self.memory
        return one_shot_norm(x, residual, weight, eps, memory, keep=keep, quantized=quantized)


def _shared(ranks: Ranks, *sizes: tuple[int, torch.dtype]) -> tuple[list[Tensor], list[Any]]:
    """(zeroed memory of this GPU, the handles by which every rank reaches the others').

    Raises RuntimeError where a process has done so for an earlier group: PyTorch counts exchanges
    by process, so one that has counted before and one that has not would wait for each other.
    The exchange holds Python's lock while it waits, so that no watch of ours could end it. It is
    begun once all ranks have their memory; one that dies within is left to a clock of C's own.
    """
    import torch.distributed._symmetric_memory as symmetric

    memory: list[Tensor] = []
    problem: Exception | None = None
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        _claim(ranks)
        memory = [symmetric.empty([n], dtype=dtype, device=device).zero_() for n, dtype in sizes]
        ranks.settle()  # nobody raises a flag that is yet to be zero
    except RuntimeError as error:
        problem = error
    if not ranks.smallest(0 if problem else 1):
        raise problem or RuntimeError("another rank has no memory for it")
    with ended_after(MAPPING_LIMIT):
        return memory, [symmetric.rendezvous(one, ranks.tensors.group_name) for one in memory]


_claimed: weakref.ReferenceType[Ranks] | None = None  # whose memory this process shares


def _claim(ranks: Ranks) -> None:
    global _claimed
    if _claimed is not None and _claimed() is not ranks:
        raise RuntimeError("this process has shared memory with the ranks of an earlier engine")
    _claimed = weakref.ref(ranks)


def candidates(
    ranks: Ranks, width: int, dtype: torch.dtype, device: torch.device
) -> list[Algorithm]:
    """The group's own all-reduce first; then whatever else can be set up on all ranks."""
    ways: dict[str, Callable[[str], Algorithm]]
    if device.type == "cpu":
        first, ways = "gloo", {"gloo one-shot": lambda name: GatherSum(ranks, name)}
    else:
        first = "nccl"
        ways = {
            "one-shot": lambda name: LibraryPeers(ranks, name, dtype, two_shot=False),
            "two-shot": lambda name: LibraryPeers(ranks, name, dtype, two_shot=True),
            "one-shot with norm": lambda name: OwnPeers(ranks, name, dtype, width),
        }
    found: list[Algorithm] = [GroupSum(ranks, first)]
    for name, build in ways.items():
        made = set_up(ranks, name, build)
        if made is not None:
            found.append(made)
    return found


def set_up(ranks: Ranks, name: str, build: Callable[[str], Any]) -> Any:
    """What `build` makes, if it can on every rank."""
    if not ranks.smallest(0 if skipped(name) else 1):
        log.warning("all-reduce by %s is left out: %s names it", name, SKIP)
        return None
    made, problem = None, "it cannot be set up on another rank"
    try:
        with ranks.limited(f"setting up all-reduce by {name}", SET_UP_LIMIT, advice(name)):
            made = build(name)
    except RankError:
        raise
    except Exception as error:
        problem = first_line(error)
    if ranks.smallest(0 if made is None else 1):
        return made
    log.warning("all-reduce by %s is left out: %s", name, problem)
    return None


def skipped(name: str) -> bool:
    """Whether a way has been named as one to leave alone."""
    return name in [part.strip() for part in os.environ.get(SKIP, "").split(",")]


def advice(name: str) -> str:
    """What helps where a way hangs."""
    return f"; {SKIP}='{name}' leaves that way out"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
