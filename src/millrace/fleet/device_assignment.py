"""Which devices each replica of a host gets, as environment variables.

GPUs are assigned whole and in order; without GPUs the cores are divided, so that replicas do not
compete for them. Nothing is started here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from millrace.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]


def visible_gpus(
    environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> list[str]:
    """Names of the GPUs this process may use: CUDA_VISIBLE_DEVICES where it is set, else 0, 1, ...
    for each device file; a container has those of its own GPUs, under any numbers."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    files = [path for path in devices.glob("nvidia*") if path.name[len("nvidia") :].isdigit()]
    return [str(index) for index in range(len(files))]


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def thread_limit(environment: Mapping[str, str] = os.environ) -> int | None:
    """Threads per process, if OMP_NUM_THREADS is set."""
    value = environment.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else None


def replica_environments(
    count: int,
    *,
    device: Device,
    gpus: Sequence[str],
    cores: int,
    gpus_per_replica: int = 1,
    threads: int | None = None,
) -> list[dict[str, str]]:
    """Environment variables of each of `count` replicas. threads: the limit for a replica
    without a GPU; None for its share of the cores.

    Raises ConfigError when there are too few GPUs, with the count that fits.
    """
    if device == "cpu" or (device == "auto" and not gpus):
        # CUDA is hidden so that "cpu" means the same on a machine that has GPUs.
        share = max(1, min(cores // max(1, count), threads or cores))
        each = {"OMP_NUM_THREADS": str(share), "CUDA_VISIBLE_DEVICES": ""}
        return [dict(each) for _ in range(count)]
    if len(gpus) < count * gpus_per_replica:
        raise ConfigError(
            f"--replicas {count} with {gpus_per_replica} GPU(s) each needs "
            f"{count * gpus_per_replica} GPUs and {len(gpus)} are visible; "
            f"at most --replicas {len(gpus) // gpus_per_replica} works"
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * gpus_per_replica : (i + 1) * gpus_per_replica])}
        for i in range(count)
    ]
