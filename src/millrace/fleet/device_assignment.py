"""How the replicas of one host share its devices: a few environment variables for each.

GPUs are given out whole, in order; without GPUs the cores are divided, so that replicas do not
compete for them. Nothing here starts anything.
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
    """Threads a process, where OMP_NUM_THREADS says so."""
    value = environment.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else None


def device_shares(
    count: int,
    *,
    device: Device,
    gpus: Sequence[str],
    cores: int,
    gpus_each: int = 1,
    threads: int | None = None,
) -> list[dict[str, str]]:
    """Environment variables of each of `count` replicas. threads: the most that a replica without
    a GPU may have; None for its share of the cores.

    Raises ConfigError when there are too few GPUs, with the count that fits.
    """
    if device == "cpu" or (device == "auto" and not gpus):
        # CUDA is hidden so that "cpu" means the same on a machine that has GPUs.
        share = max(1, min(cores // count, threads or cores))
        each = {"OMP_NUM_THREADS": str(share), "CUDA_VISIBLE_DEVICES": ""}
        return [dict(each) for _ in range(count)]
    if len(gpus) < count * gpus_each:
        raise ConfigError(
            f"--replicas {count} with {gpus_each} GPU(s) each needs {count * gpus_each} GPUs and "
            f"{len(gpus)} are visible; at most --replicas {len(gpus) // gpus_each} works"
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * gpus_each : (i + 1) * gpus_each])}
        for i in range(count)
    ]
