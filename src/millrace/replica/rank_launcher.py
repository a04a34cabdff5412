"""Starts the other ranks of a replica on this host, and reports how each of them ended.

A rank is this program again with RANK and WORLD_SIZE set, as torchrun would start it. It ends when
rank 0 stops it, when the group has failed, and at the latest with the process that started it.
"""

from __future__ import annotations

import os
import subprocess

import msgspec

from millrace.common.child_process import child_environment, python_module, reap
from millrace.config import EngineArgs
from millrace.errors import ConfigError

STARTED_HERE = "MILLRACE_STARTED_BY_RANK_0"  # set for the ranks that rank 0 starts


class LocalRanks:
    """The ranks that rank 0 started; none under torchrun, or if there is only rank 0."""

    def __init__(self, processes: dict[int, subprocess.Popen[bytes]] | None = None) -> None:
        self._processes = processes or {}

    @classmethod
    def start(cls, args: EngineArgs, size: int, port: int, device: str) -> LocalRanks:
        """Start ranks 1 and up. port: of rank 0's store on the loopback address."""
        command = python_module(
            "millrace.replica.process",
            *("--args", msgspec.json.encode(args).decode()),
            *("--parent-pid", str(os.getpid())),
        )
        shared = child_environment(
            **threads(size, device),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            WORLD_SIZE=str(size),
            **{STARTED_HERE: "1"},
        )
        return cls(
            {
                rank: subprocess.Popen(
                    command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                )
                for rank in range(1, size)
            }
        )

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes.values()]

    def exit_reason(self, rank: int) -> str | None:
        """How a rank ended, such as "died with signal 9"; None if it runs or was not started
        here."""
        process = self._processes.get(rank)
        status = process.poll() if process is not None else None
        if status is None:
            return None
        return f"died with signal {-status}" if status < 0 else f"ended with status {status}"

    def stop(self, limit: float) -> None:
        """Wait for the ranks to end; kill those that have not after `limit` seconds."""
        reap(list(self._processes.values()), limit)


def threads(size: int, device: str) -> dict[str, str]:
    """Environment for CPU ranks: they share the cores, unless OMP_NUM_THREADS is set."""
    if device != "cpu" or os.environ.get("OMP_NUM_THREADS"):
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // size))}


def require_devices(size: int, device: str, visible: int) -> None:
    """Raise ConfigError if this host has fewer GPUs than ranks."""
    if device == "cuda" and visible < size:
        raise ConfigError(
            f"tensor_parallel_size {size} needs {size} GPUs and {visible} are visible; "
            f"at most {visible} works"
        )
