"""The ranks of one replica: a plan reaches all of them, and their tensors come together.

Rank 0 schedules and sends each plan (as `plan_codec.py` words it) over a Gloo group of its own;
every rank runs it and takes part in the tensor collectives. No wait on the host is blind: every
one looks
at the watch (`heartbeat.py`), which knows when a rank is gone.
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
from millrace.runtime.ranks.heartbeat import Fate, Heartbeat, no_fate
from millrace.runtime.ranks.interruptible import run_interruptibly
from millrace.runtime.ranks.plan_codec import FIRST, Message, OtherPlanError, Plans
from millrace.runtime.ranks.process_groups import (
    JOIN_LIMIT,
    STEP_LIMIT,
    Place,
    find_store,
    form_groups,
)
from millrace.runtime.ranks.rendezvous import rendezvous

GROUP_LIMIT = 90.0  # seconds for ranks that have met to set up their groups
LEAVE_LIMIT = 5.0  # seconds for a group to be taken apart
_POLL = timedelta(seconds=0.25)
_GLANCE = 0.0005  # seconds between looks at a device step that has taken longer than most


@dataclass(slots=True, weakref_slot=True)
class Ranks:
    """This process's place among `size` ranks, and their groups (None alone)."""

    rank: int = 0
    size: int = 1
    tensors: Any = None  # dist.ProcessGroup
    plans: Any = None
    heartbeat: Heartbeat | None = None
    _messages: Plans = field(default_factory=Plans)
    _first: Tensor = field(default_factory=lambda: torch.zeros(FIRST, dtype=torch.uint8))

    @classmethod
    def join(
        cls,
        place: Place,
        backend: str,
        facts: dict[str, str],
        *,
        store: Store | None = None,
        fate: Fate = no_fate,
        on_failure: Callable[[str], None] | None = None,
    ) -> Ranks:
        """Meet the other ranks at MASTER_ADDR:MASTER_PORT, or in `store`.

        backend: gloo, or nccl on GPUs. facts: what must be equal everywhere. fate, on_failure: see
        `heartbeat.py`. Raises ConfigError for ranks that are unlike, RankError for missing ones.
        """
        if place.size == 1:
            return cls()
        address = "127.0.0.1" if store else os.environ.get("MASTER_ADDR", "127.0.0.1")
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"millrace-{attempt}", store or find_store(place))
        heartbeat = rendezvous(
            *(place.rank, place.size, address, store),
            *(facts, fate, on_failure, JOIN_LIMIT),
        )
        try:
            with heartbeat.limited(f"setting up {backend}", GROUP_LIMIT):
                groups = run_interruptibly(
                    lambda: form_groups(place, backend, store), heartbeat.check
                )
                return cls(place.rank, place.size, *groups, heartbeat)
        except BaseException as error:
            if isinstance(error, RuntimeError):  # a library's: it knows the call, not the rank
                error = heartbeat.explain(error)
            heartbeat.fail(f"rank {place.rank} could not join: {error}")
            heartbeat.leave()
            if not dist.is_initialized():  # groups are named by their number, on all ranks alike
                dist.distributed_c10d._world.group_count = 0
            raise error from None

    # --- plans ------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Rank 0: send a message to every other rank. Raises RankError if the group has failed."""
        if self.size == 1:
            return
        data = torch.frombuffer(self._messages.pack(message), dtype=torch.uint8)
        self._begin()
        first = data[:FIRST]
        self._first[: len(first)] = first
        self._broadcast(self._first)
        if len(data) > FIRST:
            self._broadcast(data[FIRST:])

    def receive(self) -> Message:
        """Other ranks: wait for the next message of rank 0, and check that it is the next one."""
        self._broadcast(self._first)
        data = self._first.numpy().tobytes()
        if rest := self._messages.rest(data):
            more = torch.empty(rest, dtype=torch.uint8)
            self._broadcast(more)
            data += more.numpy().tobytes()
        try:
            message = self._messages.unpack(data)
        except OtherPlanError as other:
            self._disagree(str(other))
        self._begin()
        return message

    def _begin(self) -> None:
        if self.heartbeat is not None:
            self.heartbeat.begin(self._messages.number)

    def _disagree(self, what: str) -> NoReturn:
        error = RankError(f"rank {self.rank} (pid {os.getpid()}) holds another plan: step {what}")
        self.fail(str(error))
        raise error

    def _broadcast(self, data: Tensor) -> None:
        with self._explained():
            self._finish(self.plans.broadcast([data], _from_rank_0()))

    # --- tensors ----------------------------------------------------------------------------

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place; the same bits on every rank."""
        with self._explained():
            if x.is_cuda:
                dist.all_reduce(x, group=self.tensors)  # on the current stream
            else:
                self._finish(self.tensors.allreduce([x]))
        return x

    def maximum(self, x: Tensor) -> Tensor:
        """The largest over ranks, number by number, in place."""
        with self._explained():
            if x.is_cuda:
                dist.all_reduce(x, dist.ReduceOp.MAX, group=self.tensors)
            else:
                self._finish(self.tensors.allreduce([x], _reduction(dist.ReduceOp.MAX)))
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's x [..., n] side by side in rank order: [..., size * n]."""
        return torch.cat(self.gather_parts(x), dim=-1)

    def gather_parts(self, x: Tensor) -> list[Tensor]:
        """Every rank's x, in rank order."""
        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)
        ]
        with self._explained():
            if x.is_cuda:
                dist.all_gather(parts, x, group=self.tensors)
            else:
                self._finish(self.tensors.allgather([parts], [x]))
        return parts

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x on every rank, so that none goes its own way by a rounding."""
        if self.size == 1:
            return x
        with self._explained():
            if x.is_cuda:
                dist.broadcast(x, src=0, group=self.tensors)
            else:
                self._finish(self.tensors.broadcast([x], _from_rank_0()))
        return x

    def smallest(self, value: int) -> int:
        """The smallest of the ranks' numbers, on every rank."""
        return int(self._agree([value], dist.ReduceOp.MIN)[0])

    def largest(self, values: list[float]) -> list[float]:
        """Number by number the largest of the ranks', on every rank."""
        return self._agree(values, dist.ReduceOp.MAX)

    def _agree(self, values: list[float], op: Any) -> list[float]:
        if self.size == 1:
            return values
        found = torch.tensor(values, dtype=torch.float64)
        options = _reduction(op)
        with self._explained():
            self._finish(self.plans.allreduce([found], options))
        return [float(x) for x in found.tolist()]

    # --- waiting ----------------------------------------------------------------------------

    def check(self) -> None:
        """Raise RankError if the group has failed."""
        if self.heartbeat is not None:
            self.heartbeat.check()

    @contextmanager
    def limited(self, doing: str, seconds: float, advice: str = "") -> Iterator[None]:
        """Have the group fail, this rank named, if what is within takes longer than that.

        Waits within must be of the kinds below: they end when the group fails, others may not.
        """
        if self.heartbeat is None:
            yield
            return
        with self.heartbeat.limited(doing, seconds, advice):
            yield

    def fail(self, message: str) -> None:
        """Tell all ranks that the group cannot go on."""
        if self.heartbeat is not None:
            self.heartbeat.fail(message)

    def settle(self) -> None:
        """Wait for all that this rank has launched on its GPU's current stream.

        Whatever else waits for the device (a capture's beginning, freed memory) does so without
        looking up: with a collective in flight and a rank gone it would never return.
        """
        event = torch.cuda.Event()
        event.record()
        self.wait(event)

    def wait(self, event: torch.cuda.Event) -> None:
        """Wait for the device, but not for ever. Raises RankError if the group has failed."""
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
                    f"step {self._messages.number} has not ended within {spent:.0f} s on a rank"
                )
            time.sleep(_GLANCE)

    def _finish(self, work: Any) -> None:
        """Wait for a collective between hosts' memories."""
        while True:
            try:
                work.wait(_POLL)
                return
            except RuntimeError:
                # The end may have come just behind the limit of this wait, so its error says
                # nothing of the work itself; that is for a wait that has nothing to wait for.
                if work.is_completed():
                    work.wait()
                    return
                self.check()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Have a collective's error say which rank it comes from."""
        self.check()
        try:
            yield
        except RuntimeError as error:
            if self.heartbeat is None:
                raise
            raise self.heartbeat.explain(error) from None

    def leave(self) -> None:
        """Part from the other ranks; no collective may follow.

        The groups are dropped here, not at the interpreter's end: dropping one joins Gloo's
        threads, and a thread that frees its last tensor while Python is being torn down aborts
        the process. CUDA graphs that hold collectives must be gone by now: NCCL waits for them.
        """
        if self.size == 1 or self.heartbeat is None:
            return
        heartbeat, self.heartbeat = self.heartbeat, None
        heartbeat.leave()
        self.tensors = self.plans = None
        if not dist.is_initialized():
            return
        # A collective that waits for a rank that is stopped or gone may hold this up.
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
