"""The rank of this process, and the process groups of a replica.

It knows launchers (torchrun's environment, or our own store) and libraries (Gloo, NCCL). It does
not know what is sent over the groups, nor what happens if a rank fails.
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

JOIN_LIMIT = 300.0  # seconds for all ranks to start and join
STEP_LIMIT = timedelta(seconds=120)  # for a collective, and for a step on the device
PLAN_LIMIT = timedelta(days=365)  # an idle replica waits for its next plan without limit
_NO_MULTICAST = {  # NVLink multicast is off in every library that would use it
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


@dataclass(frozen=True, slots=True)
class RankInfo:
    """The rank of this process among `size`; local: its number on this host, and so its GPU."""

    rank: int = 0
    size: int = 1
    local: int = 0


def launched_by_torchrun() -> bool:
    """Whether a launcher has set RANK and WORLD_SIZE."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def torchrun_rank_info(tensor_parallel_size: int) -> RankInfo:
    """This process's rank under torchrun. Raises ConfigError if flag and launcher disagree."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if tensor_parallel_size not in (1, size):
        raise ConfigError(
            f"tensor_parallel_size {tensor_parallel_size}, but torchrun started {size} processes; "
            f"leave it out or give {size}"
        )
    return RankInfo(rank, size, int(os.environ.get("LOCAL_RANK", rank)))


def open_store() -> TCPStore:
    """A store on a free port, through which the ranks of this host find each other."""
    return TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


def find_store(place: RankInfo) -> Store:
    """The store at MASTER_ADDR:MASTER_PORT. Raises ConfigError if it cannot be reached."""
    try:
        found: tuple[Store, int, int] = next(
            rendezvous("env://", place.rank, place.size, timeout=timedelta(seconds=JOIN_LIMIT))
        )
    except (ValueError, dist.DistError) as error:
        raise ConfigError(f"the ranks cannot meet: {str(error).splitlines()[0]}") from None
    return found[0]


def form_groups(place: RankInfo, backend: str, store: Store) -> tuple[Any, Any]:
    """(the group for tensors, the group for plans). backend: gloo or nccl, for tensors."""
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
