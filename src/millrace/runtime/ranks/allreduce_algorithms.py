"""The all-reduce algorithms: how each is set up, and which messages it supports.

allreduce.py checks and measures them. The environment variable MILLRACE_SKIP_ALL_REDUCE names
algorithms to leave out, separated by commas, for the case that one hangs.
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
from millrace.model.parallel import NormResult
from millrace.runtime.ranks.interruptible import kill_process_after
from millrace.runtime.ranks.ranks import Ranks

log = logging.getLogger("millrace.ranks")

PEER_ROWS = 512  # most rows of a message for our own peer memory kernel
PEER_BYTES = 8 << 20  # most bytes of a message for PyTorch's peer memory kernels
TRIAL_POLLS = 1 << 21  # about two seconds; a flag that is not set by then never will be
SET_UP_LIMIT = 60.0  # seconds to set up one algorithm
MAPPING_LIMIT = 20.0  # seconds for ranks to map each other's memory
SKIP_VARIABLE = "MILLRACE_SKIP_ALL_REDUCE"


class Algorithm(Protocol):
    """An all-reduce algorithm. Every rank must make the same calls."""

    @property
    def name(self) -> str:
        """Its name in the table and in the log."""

    def supports(self, x: Tensor) -> bool:
        """Whether it supports a message like x, [T, H]."""

    def __call__(self, x: Tensor) -> Tensor:
        """The sum over ranks, in x or in another tensor. x may be overwritten."""


@dataclass(frozen=True, slots=True)
class GroupAllReduce:
    """The all-reduce of the process group: Gloo on host memory, NCCL on GPUs."""

    ranks: Ranks
    name: str

    def supports(self, x: Tensor) -> bool:
        return True

    def __call__(self, x: Tensor) -> Tensor:
        return self.ranks.all_reduce(x)


@dataclass(frozen=True, slots=True)
class GatherAllReduce:
    """All-gather, then a sum in rank order: one exchange, where a ring needs several; but it sends
    more bytes."""

    ranks: Ranks
    name: str

    def supports(self, x: Tensor) -> bool:
        return x.nbytes * self.ranks.size <= PEER_BYTES

    def __call__(self, x: Tensor) -> Tensor:
        first, *others = self.ranks.all_gather_parts(x)
        for other in others:
            first += other
        return first


class TorchPeerAllReduce:
    """PyTorch's one-shot or two-shot kernel on symmetric memory, without multicast."""

    def __init__(self, ranks: Ranks, name: str, dtype: torch.dtype, two_shot: bool) -> None:
        self.name = name
        self._two_shot = two_shot
        self._group = ranks.tensors.group_name
        (self._buffer,), _ = _share_memory(ranks, (PEER_BYTES // dtype.itemsize, dtype))

    def supports(self, x: Tensor) -> bool:
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


class PeerAllReduce:
    """Our one-shot kernel on symmetric memory; it can include the residual add and the norm."""

    def __init__(self, ranks: Ranks, name: str, dtype: torch.dtype, width: int) -> None:
        from millrace.kernels.gpu.all_reduce import PeerMemory

        self.name = name
        self._dtype = dtype
        values, flags = (2 * PEER_ROWS * width, dtype), (PEER_ROWS * ranks.size, torch.int32)
        shared, handles = _share_memory(ranks, values, flags)
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

    def wait_without_limit(self) -> None:
        """The algorithm has passed its check: from now on wait for other ranks without limit."""
        from millrace.kernels.gpu.all_reduce import EVER

        self.memory.patience = EVER

    def supports(self, x: Tensor) -> bool:
        return x.is_cuda and x.dtype == self._dtype and self.memory.takes(x)

    def __call__(self, x: Tensor) -> Tensor:
        from millrace.kernels.gpu.all_reduce import one_shot

        return one_shot(x, self.memory)

    def all_reduce_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, keep: bool, quantized: bool
    ) -> NormResult:
        """(rms_norm(s), its quantised form, s) for s = the sum of x over the ranks + residual."""
        from millrace.kernels.gpu.all_reduce import one_shot_norm

        memory = self.memory
        return one_shot_norm(x, residual, weight, eps, memory, keep=keep, quantized=quantized)


def _share_memory(ranks: Ranks, *sizes: tuple[int, torch.dtype]) -> tuple[list[Tensor], list[Any]]:
    """(zeroed memory of this GPU, handles to the same memory of every rank).

    Raises RuntimeError if this process has shared memory for an earlier group: PyTorch counts the
    exchanges of a process, so a process that has made some and one that has not would wait for
    each other. The exchange holds the interpreter lock while it waits, so the heartbeat cannot end
    it. It begins once all ranks have allocated; after that a C timer ends this process if it hangs.
    """
    import torch.distributed._symmetric_memory as symmetric

    memory: list[Tensor] = []
    problem: Exception | None = None
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        claim_process(ranks)
        memory = [symmetric.empty([n], dtype=dtype, device=device).zero_() for n, dtype in sizes]
        ranks.wait_for_device()  # no rank may set a flag before it is zeroed
    except RuntimeError as error:
        problem = error
    if not ranks.min_over_ranks(0 if problem else 1):
        raise problem or RuntimeError("another rank could not allocate its memory")
    with kill_process_after(MAPPING_LIMIT):
        return memory, [symmetric.rendezvous(one, ranks.tensors.group_name) for one in memory]


claimed_by: weakref.ReferenceType[Ranks] | None = (
    None  # the group that this process shares memory with
)


def claim_process(ranks: Ranks) -> None:
    """Note that this process shares memory with these ranks. RuntimeError if it did with others."""
    global claimed_by
    if claimed_by is not None and claimed_by() is not ranks:
        raise RuntimeError("this process has shared memory with the ranks of an earlier engine")
    claimed_by = weakref.ref(ranks)


def candidates(
    ranks: Ranks, width: int, dtype: torch.dtype, device: torch.device
) -> list[Algorithm]:
    """The group's own all-reduce first, then the others that can be set up on all ranks."""
    builders: dict[str, Callable[[str], Algorithm]]
    if device.type == "cpu":
        first, builders = "gloo", {"gloo one-shot": lambda name: GatherAllReduce(ranks, name)}
    else:
        first = "nccl"
        builders = {
            "one-shot": lambda name: TorchPeerAllReduce(ranks, name, dtype, two_shot=False),
            "two-shot": lambda name: TorchPeerAllReduce(ranks, name, dtype, two_shot=True),
            "one-shot with norm": lambda name: PeerAllReduce(ranks, name, dtype, width),
        }
    found: list[Algorithm] = [GroupAllReduce(ranks, first)]
    for name, build in builders.items():
        made = set_up(ranks, name, build)
        if made is not None:
            found.append(made)
    return found


def set_up(ranks: Ranks, name: str, build: Callable[[str], Any]) -> Any:
    """What `build` returns; None, on all ranks, if it failed on one of them."""
    if not ranks.min_over_ranks(0 if is_skipped(name) else 1):
        log.warning("all-reduce by %s is left out, as %s asks", name, SKIP_VARIABLE)
        return None
    made, problem = None, "it cannot be set up on another rank"
    try:
        with ranks.limited(f"setting up all-reduce by {name}", SET_UP_LIMIT, advice(name)):
            made = build(name)
    except RankError:
        raise
    except Exception as error:
        problem = first_line(error)
    if ranks.min_over_ranks(0 if made is None else 1):
        return made
    log.warning("all-reduce by %s is left out: %s", name, problem)
    return None


def is_skipped(name: str) -> bool:
    """Whether MILLRACE_SKIP_ALL_REDUCE names the algorithm."""
    return name in [part.strip() for part in os.environ.get(SKIP_VARIABLE, "").split(",")]


def advice(name: str) -> str:
    """What helps if an algorithm hangs."""
    return f"; {SKIP_VARIABLE}='{name}' leaves that algorithm out"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
