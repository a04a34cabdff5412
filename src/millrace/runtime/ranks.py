"""The ranks of one replica: the groups they form, and how a plan reaches them.

Rank 0 schedules and sends each plan; every rank runs it and takes part in the tensor collectives.
Plans are msgpack bytes over a Gloo group of their own, each with its number and a digest of all so
far, so that a rank that missed or misread one says so instead of running it. No wait on the host is
blind: every one looks at the watch (`watch.py`), which knows when a rank is gone.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from millrace.errors import ConfigError, RankError
from millrace.protocol import ToRank
from millrace.runtime.apart import apart
from millrace.runtime.meeting import meet
from millrace.runtime.watch import Fate, Watch, no_fate


class MeasureSums(msgspec.Struct, frozen=True, tag="measure"):
    """Take part in measuring sums over messages of so many tokens."""

    rows: list[int]


Message = ToRank | MeasureSums
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode

JOIN_LIMIT = 300.0  # seconds for all ranks to start and meet
GROUP_LIMIT = 90.0  # seconds for ranks that have met to set up their groups
LEAVE_LIMIT = 5.0  # seconds for a group to be taken apart
STEP_LIMIT = timedelta(seconds=120)  # for a collective, and for a step on the device
PLAN_LIMIT = timedelta(days=365)  # an idle replica waits for its next plan as long as it takes
_POLL = timedelta(seconds=0.25)
_GLANCE = 0.0005  # seconds between looks at a device step that has taken longer than most
# A plan's first message: its length, its number, a digest of all plans so far, its first bytes.
_HEADER = struct.Struct("<IQ8s")
_FIRST = 2048
_NO_MULTICAST = {  # NVLink multicast stays off in every library that would use it
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Which of `size` ranks this process is; local: its number on its own host, so its GPU."""

    rank: int = 0
    size: int = 1
    local: int = 0


@dataclass(slots=True)
class Ranks:
    """This process's place among `size` ranks, and their groups (None alone)."""

    rank: int = 0
    size: int = 1
    tensors: Any = None  # dist.ProcessGroup
    plans: Any = None
    watch: Watch | None = None
    _plans: int = 0  # sent or received so far
    _digest: bytes = bytes(8)  # of all of them
    _first: Tensor = field(default_factory=lambda: torch.zeros(_FIRST, dtype=torch.uint8))

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
        `watch.py`. Raises ConfigError for ranks that are unlike, RankError for missing ones.
        """
        if place.size == 1:
            return cls()
        address = "127.0.0.1" if store else os.environ.get("MASTER_ADDR", "127.0.0.1")
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"millrace-{attempt}", store or _store(place))
        watch = meet(
            *(place.rank, place.size, address, store),
            *(facts, fate, on_failure, JOIN_LIMIT),
        )
        try:
            with watch.limited(f"setting up {backend}", GROUP_LIMIT):
                groups = apart(lambda: _groups(place, backend, store), watch.check)
                return cls(place.rank, place.size, *groups, watch)
        except BaseException as error:
            if isinstance(error, RuntimeError):  # a library's: it knows the call, not the rank
                error = watch.explain(error)
            watch.fail(f"rank {place.rank} could not join: {error}")
            watch.leave()
            if not dist.is_initialized():  # groups are named by their number, on all ranks alike
                dist.distributed_c10d._world.group_count = 0
            raise error from None

    # --- plans ------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Rank 0: send a message to every other rank. Raises RankError if the group has failed."""
        if self.size == 1:
            return
        body = _encode(message)
        self._advance(body)
        header = _HEADER.pack(len(body), self._plans, self._digest)
        data = torch.frombuffer(bytearray(header + body), dtype=torch.uint8)
        first = data[:_FIRST]
        self._first[: len(first)] = first
        self._broadcast(self._first)
        if len(data) > _FIRST:
            self._broadcast(data[_FIRST:])

    def receive(self) -> Message:
        """Other ranks: wait for the next message of rank 0, and check that it is the next one."""
        self._broadcast(self._first)
        length, number, digest = _HEADER.unpack(bytes(self._first[: _HEADER.size].tolist()))
        body = self._first[_HEADER.size :][:length]
        if (rest := length - len(body)) > 0:
            data = torch.empty(rest, dtype=torch.uint8)
            self._broadcast(data)
            body = torch.cat([body, data])
        raw = body.numpy().tobytes()
        self._advance(raw)
        if number != self._plans:
            self._disagree(f"{self._plans} where rank 0 has {number}")
        if digest != self._digest:
            self._disagree(
                f"{number} with digest {self._digest.hex()} where rank 0 has {digest.hex()}"
            )
        message: Message = _decode(raw)
        return message

    def _advance(self, body: bytes) -> None:
        self._plans += 1
        self._digest = hashlib.blake2b(self._digest + body, digest_size=8).digest()
        if self.watch is not None:
            self.watch.begin(self._plans)

    def _disagree(self, what: str) -> None:
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
        if self.watch is not None:
            self.watch.check()

    @contextmanager
    def limited(self, doing: str, seconds: float, advice: str = "") -> Iterator[None]:
        """Have the group fail, this rank named, if what is within takes longer than that.

        Waits within must be of the kinds below: they end when the group fails, others may not.
        """
        if self.watch is None:
            yield
            return
        with self.watch.limited(doing, seconds, advice):
            yield

    def fail(self, message: str) -> None:
        """Tell all ranks that the group cannot go on."""
        if self.watch is not None:
            self.watch.fail(message)

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
                raise RankError(f"step {self._plans} has not ended within {spent:.0f} s on a rank")
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
            if self.watch is None:
                raise
            raise self.watch.explain(error) from None

    def leave(self) -> None:
        """Part from the other ranks; no collective may follow.

        The groups are dropped here, not at the interpreter's end: dropping one joins Gloo's
        threads, and a thread that frees its last tensor while Python is being torn down aborts
        the process. CUDA graphs that hold collectives must be gone by now: NCCL waits for them.
        """
        if self.size == 1 or self.watch is None:
            return
        watch, self.watch = self.watch, None
        watch.leave()
        self.tensors = self.plans = None
        if not dist.is_initialized():
            return
        # A collective that waits for a rank that is stopped or gone may hold this up.
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(LEAVE_LIMIT)


# --- meeting -----------------------------------------------------------------------------------


def launched_by_torchrun() -> bool:
    """Whether RANK and WORLD_SIZE name this process's place already."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def place(tensor_parallel_size: int) -> Place:
    """This process's place under torchrun. Raises ConfigError where flag and launcher disagree."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if tensor_parallel_size not in (1, size):
        raise ConfigError(
            f"tensor_parallel_size {tensor_parallel_size}, but torchrun started {size} processes; "
            f"leave it out or give {size}"
        )
    return Place(rank, size, int(os.environ.get("LOCAL_RANK", rank)))


def open_store() -> TCPStore:
    """Where ranks of this host find each other: a store of ours on a free port."""
    return TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


def _store(place: Place) -> Store:
    """The store at MASTER_ADDR:MASTER_PORT."""
    try:
        found: tuple[Store, int, int] = next(
            rendezvous("env://", place.rank, place.size, timeout=timedelta(seconds=JOIN_LIMIT))
        )
    except (ValueError, dist.DistError) as error:
        raise ConfigError(f"the ranks cannot meet: {str(error).splitlines()[0]}") from None
    return found[0]


def _from_rank_0() -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    return options


def _reduction(op: Any) -> Any:
    options = dist.AllreduceOptions()
    options.reduceOp = op
    return options


def _groups(place: Place, backend: str, store: Store) -> tuple[Any, Any]:
    """(the group of the tensors, the group of the plans)."""
    device = None
    if backend == "nccl":
        for name, value in _NO_MULTICAST.items():
            os.environ.setdefault(name, value)
        device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group(
        backend,
        store=store,
        rank=place.rank,
        world_size=place.size,
        timeout=STEP_LIMIT,
        device_id=device,
    )
    plans = dist.new_group(backend="gloo", timeout=PLAN_LIMIT)
    return dist.group.WORLD, plans
