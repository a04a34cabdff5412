"""Where the ranks of one replica stand and meet, and the process groups they form.

It knows launchers (torchrun's environment, or a store of ours) and libraries (Gloo, NCCL); what
goes over the groups, and what becomes of a rank that fails, is not known here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from millrace.errors import ConfigError

JOIN_LIMIT = 300.0  # seconds for all ranks to start and meet
STEP_LIMIT = timedelta(seconds=120)  # for a collective, and for a step on the device
PLAN_LIMIT = timedelta(days=365)  # an idle replica waits for its next plan as long as it takes
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


def launched_by_torchrun() -> bool:
    """Whether RANK and WORLD_SIZE name this process's place already."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def torchrun_place(tensor_parallel_size: int) -> Place:
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


def find_store(place: Place) -> Store:
    """The store at MASTER_ADDR:MASTER_PORT. Raises ConfigError if nothing leads to it."""
    try:
        found: tuple[Store, int, int] = next(
            rendezvous("env://", place.rank, place.size, timeout=timedelta(seconds=JOIN_LIMIT))
        )
    except (ValueError, dist.DistError) as error:
        raise ConfigError(f"the ranks cannot meet: {str(error).splitlines()[0]}") from None
    return found[0]


def form_groups(place: Place, backend: str, store: Store) -> tuple[Any, Any]:
    """(the group of the tensors, the group of the plans). backend: gloo or nccl, of the tensors."""
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
