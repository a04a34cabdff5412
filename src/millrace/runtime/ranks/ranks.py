"""The ranks of one replica: they get the same plans, and their tensors are reduced together.

Rank 0 schedules and sends each plan (encoded by `plan_codec.py`) over its own Gloo group; every
rank runs it and takes part in the tensor collectives. No host wait is unbounded: each one checks
the heartbeat (`heartbeat.py`), which knows when a rank has failed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from millrace.errors import RankError
from millrace.runtime.ranks.heartbeat import ExitReason, Heartbeat, unknown_exit
from millrace.runtime.ranks.interruptible import run_interruptibly
from millrace.runtime.ranks.plan_codec import FIRST_BYTES, Message, PlanCodec, PlanMismatchError
from millrace.runtime.ranks.process_groups import (
    JOIN_LIMIT,
    STEP_LIMIT,
    RankInfo,
    find_store,
    form_groups,
)
from millrace.runtime.ranks.rendezvous import rendezvous

GROUP_LIMIT = 90.0  # seconds to set up the process groups after the rendezvous
LEAVE_LIMIT = 5.0  # seconds to destroy the process groups
_POLL = timedelta(seconds=0.25)
_POLL_SECONDS = 0.0005  # seconds between polls of a step on the device


@dataclass(slots=True, weakref_slot=True)
class Ranks:
    """This process's rank among `size`, and the process groups (None if there is one rank)."""

    rank: int = 0
    size: int = 1
    tensors: Any = None  # dist.ProcessGroup
    plans: Any = None
    heartbeat: Heartbeat | None = None
    _codec: PlanCodec = field(default_factory=PlanCodec)
    _first_part: Tensor = field(default_factory=lambda: torch.zeros(FIRST_BYTES, dtype=torch.uint8))

    @classmethod
    def join(
        cls,
        place: RankInfo,
        backend: str,
        facts: dict[str, str],
        *,
        store: Store | None = None,
        exit_reason: ExitReason = unknown_exit,
        on_failure: Callable[[str], None] | None = None,
    ) -> Ranks:
        """Join the other ranks at MASTER_ADDR:MASTER_PORT, or through `store`.

        backend: gloo, or nccl on GPUs. facts: what must be equal on all ranks. exit_reason,
        on_failure: see `heartbeat.py`. Raises ConfigError if facts differ, RankError if a rank is
        missing.
        """
        if place.size == 1:
            return cls()
        address = "127.0.0.1" if store else os.environ.get("MASTER_ADDR", "127.0.0.1")
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"millrace-{attempt}", store or find_store(place))
        heartbeat = rendezvous(
            *(place.rank, place.size, address, store),
            *(facts, exit_reason, on_failure, JOIN_LIMIT),
        )
        try:
            with heartbeat.limited(f"setting up {backend}", GROUP_LIMIT):
                groups = run_interruptibly(
                    lambda: form_groups(place, backend, store), heartbeat.check
                )
                return cls(place.rank, place.size, *groups, heartbeat)
        except BaseException as error:
            if isinstance(error, RuntimeError):  # a library's error; it does not name the rank
                error = heartbeat.explain(error)
            heartbeat.fail(f"rank {place.rank} could not join: {error}")
            heartbeat.leave()
            if not dist.is_initialized():  # group numbers must be the same on all ranks
                dist.distributed_c10d._world.group_count = 0
            raise error from None

    # --- plans ------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Rank 0: send a message to every other rank. Raises RankError if the group has failed."""
        if self.size == 1:
            return
        data = torch.frombuffer(self._codec.pack(message), dtype=torch.uint8)
        self._begin()
        first = data[:FIRST_BYTES]
        self._first_part[: len(first)] = first
        self.broadcast_bytes(self._first_part)
        if len(data) > FIRST_BYTES:
            self.broadcast_bytes(data[FIRST_BYTES:])

    def receive(self) -> Message:
        """Other ranks: wait for rank 0's next message, and check its number and digest."""
        self.broadcast_bytes(self._first_part)
        data = self._first_part.numpy().tobytes()
        if rest := self._codec.remaining_bytes(data):
            more = torch.empty(rest, dtype=torch.uint8)
            self.broadcast_bytes(more)
            data += more.numpy().tobytes()
        try:
            message = self._codec.unpack(data)
        except PlanMismatchError as other:
            self._fail_on_mismatch(str(other))
        self._begin()
        return message

    def _begin(self) -> None:
        if self.heartbeat is not None:
            self.heartbeat.begin(self._codec.number)

    def _fail_on_mismatch(self, what: str) -> NoReturn:
        error = RankError(f"rank {self.rank} (pid {os.getpid()}) has another plan: step {what}")
        self.fail(str(error))
        raise error

    def broadcast_bytes(self, data: Tensor) -> None:
        with self._errors_name_the_rank():
            self.wait_for_work(self.plans.broadcast([data], _from_rank_0()))

    # --- tensors ----------------------------------------------------------------------------

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place; the same bits on every rank."""
        with self._errors_name_the_rank():
            if x.is_cuda:
                dist.all_reduce(x, group=self.tensors)  # on the current stream
            else:
                self.wait_for_work(self.tensors.allreduce([x]))
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The elementwise maximum over ranks, in place."""
        with self._errors_name_the_rank():
            if x.is_cuda:
                dist.all_reduce(x, dist.ReduceOp.MAX, group=self.tensors)
            else:
                self.wait_for_work(self.tensors.allreduce([x], _reduction(dist.ReduceOp.MAX)))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x [..., n], concatenated in rank order: [..., size * n]."""
        return torch.cat(self.all_gather_parts(x), dim=-1)

    def all_gather_parts(self, x: Tensor) -> list[Tensor]:
        """Every rank's x, in rank order."""
        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)
        ]
        with self._errors_name_the_rank():
            if x.is_cuda:
                dist.all_gather(parts, x, group=self.tensors)
            else:
                self.wait_for_work(self.tensors.allgather([parts], [x]))
        return parts

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x on every rank, so that no rank differs by a rounding."""
        if self.size == 1:
            return x
        with self._errors_name_the_rank():
            if x.is_cuda:
                dist.broadcast(x, src=0, group=self.tensors)
            else:
                self.wait_for_work(self.tensors.broadcast([x], _from_rank_0()))
        return x

    def min_over_ranks(self, value: int) -> int:
        """The smallest of the ranks' values, on every rank."""
        return int(self._reduce_numbers([value], dist.ReduceOp.MIN)[0])

    def mins_over_ranks(self, values: list[int]) -> list[int]:
        """The elementwise minimum of the ranks' values, on every rank."""
        return [int(x) for x in self._reduce_numbers([*values], dist.ReduceOp.MIN)]

    def max_over_ranks(self, values: list[float]) -> list[float]:
        """The elementwise maximum of the ranks' values, on every rank."""
        return self._reduce_numbers(values, dist.ReduceOp.MAX)

    def _reduce_numbers(self, values: list[float], op: Any) -> list[float]:
        if self.size == 1:
            return values
        found = torch.tensor(values, dtype=torch.float64)
        options = _reduction(op)
        with self._errors_name_the_rank():
            self.wait_for_work(self.plans.allreduce([found], options))
        return [float(x) for x in found.tolist()]

    # --- waiting ----------------------------------------------------------------------------

    def check(self) -> None:
        """Raise RankError if the group has failed."""
        if self.heartbeat is not None:
            self.heartbeat.check()

    @contextmanager
    def limited(self, doing: str, seconds: float, advice: str = "") -> Iterator[None]:
        """Fail the group, and name this rank, if the `with` block takes longer than `seconds`.

        doing: what the block does, for the error message. Inside it use only the waits below: they
        end when the group fails, others may not.
        """
        if self.heartbeat is None:
            yield
            return
        with self.heartbeat.limited(doing, seconds, advice):
            yield

    def fail(self, message: str) -> None:
        """Fail the group on all ranks, with this message."""
        if self.heartbeat is not None:
            self.heartbeat.fail(message)

    def wait_for_device(self) -> None:
        """Wait for the GPU's current stream, but not for ever.

        Call it before anything else that waits for the device (the start of a graph capture, a
        free): such a wait never returns if a collective is in flight and a rank is gone.
        """
        event = torch.cuda.Event()
        event.record()
        self.wait(event)

    def wait(self, event: torch.cuda.Event) -> None:
        """Wait for an event, but not for ever. Raises RankError if the group has failed."""
        if self.size == 1:
            event.synchronize()
            return
        began = time.monotonic()
        while not event.query():
            if (spent := time.monotonic() - began) < 0.1:
                continue
            self.check()
            if spent > STEP_LIMIT.total_seconds():
                raise RankError(
                    f"step {self._codec.number} has not ended on some rank within {spent:.0f} s"
                )
            time.sleep(_POLL_SECONDS)

    def wait_for_work(self, work: Any) -> None:
        """Wait for a collective on host memory."""
        while True:
            try:
                work.wait(_POLL)
                return
            except RuntimeError:
                # This wait timed out, or the work failed. The work may also have ended just
                # after the timeout; then another wait returns at once, with the work's own error.
                if work.is_completed():
                    work.wait()
                    return
                self.check()

    @contextmanager
    def _errors_name_the_rank(self) -> Iterator[None]:
        """Turn a collective's error into a RankError that names the rank at fault."""
        self.check()
        try:
            yield
        except RuntimeError as error:
            if self.heartbeat is None:
                raise
            raise self.heartbeat.explain(error) from None

    def leave(self) -> None:
        """Leave the group; no collective may follow.

        The groups are destroyed here, not at interpreter exit: that joins Gloo's threads, and a
        thread that frees its last tensor during interpreter exit aborts the process. CUDA graphs
        with collectives must be freed before: NCCL waits for them.
        """
        if self.size == 1 or self.heartbeat is None:
            return
        heartbeat, self.heartbeat = self.heartbeat, None
        heartbeat.leave()
        self.tensors = self.plans = None
        if not dist.is_initialized():
            return
        # This hangs if a collective still waits for a rank that is stopped or gone.
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(LEAVE_LIMIT)


def _from_rank_0() -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    return options


def _reduction(op: Any) -> Any:
    options = dist.AllreduceOptions()
    options.reduceOp = op
    return options
