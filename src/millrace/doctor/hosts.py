"""Checks between hosts: clocks, versions, addresses, and an all-reduce that is measured.

torchrun starts it on every host at once. The first rank reports.
"""

from __future__ import annotations

import os
import platform
import socket
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import msgspec

from millrace.doctor.finding import Finding
from millrace.doctor.host import ROOT, said
from millrace.doctor.network import rdma_ports
from millrace.errors import ConfigError
from millrace.version import __version__

START = ("torchrun --nnodes 2 --nproc-per-node 1 --node-rank 0 --master-addr HOST --master-port "
         "29500 -m millrace doctor --hosts")  # fmt: skip
PATIENCE = timedelta(seconds=120)  # for hosts that do not come, and messages that do not
CLOCK_ROUNDS = 32
SKEW_WARNS = 0.05  # seconds: traces and logs of two hosts do not go together beyond that
SIZES = (1 << 16, 1 << 22, 1 << 26)  # bytes
SHARE = 0.5  # of the slowest link, that a large all-reduce should have
_ROUNDS = 8


class HostFacts(msgspec.Struct, frozen=True):
    """What one rank says of its host. gids: first indices of RoCE v2, by device. mtus: by network
    device. gbits: of its slowest active link for RDMA; 0: it has none."""

    host: str
    millrace: str
    torch: str
    nccl: str
    driver: str
    gids: dict[str, int]
    mtus: dict[str, int]
    gbits: float


class AllReduce(msgspec.Struct, frozen=True):
    """The median of some rounds. bus: bytes a second over each link, for any number of ranks."""

    bytes: int
    seconds: float
    bus: float


def examine(environment: Mapping[str, str] = os.environ) -> list[Finding] | None:
    """The findings, at the first rank; None at the others. Raises ConfigError without torchrun, or
    if the hosts do not meet."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        raise ConfigError(f"--hosts runs on every host at once, each with its number: {START}")
    if int(environment["WORLD_SIZE"]) < 2:
        raise ConfigError("--hosts compares 2 hosts or more: --nnodes 2")
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(environment.get("LOCAL_RANK", 0)))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = f"{environment.get('MASTER_ADDR')} port {environment.get('MASTER_PORT')}"
        raise ConfigError(f"--hosts: no meeting at {where}: {str(error).splitlines()[0]}") from None
    try:
        return _findings(dist.get_rank(), "cuda" if gpus else "cpu")
    finally:
        dist.destroy_process_group()


def _findings(rank: int, device: str) -> list[Finding] | None:
    """Every rank takes part in every measurement, in the same order."""
    facts, skews = _gather(_facts()), _skews()
    timings = [_all_reduce(size, device) for size in SIZES]
    if rank:
        return None
    return [*compare(facts), *clocks(facts, skews), *speed(facts, timings, device)]


def _facts() -> HostFacts:
    import torch

    ports = [port for port in rdma_ports(ROOT) if port.active]
    driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else ()
    return HostFacts(
        host=socket.gethostname(),
        millrace=__version__,
        torch=str(torch.__version__),
        nccl=".".join(map(str, nccl)),
        driver=(driver.splitlines() or [""])[0].strip() or platform.release(),
        gids={port.device: next(iter(port.gids)) for port in ports if port.gids},
        mtus={port.netdev: port.mtu for port in ports if port.mtu},
        gbits=min((port.gbits for port in ports), default=0.0),
    )


def _gather(facts: HostFacts) -> list[HostFacts]:
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, msgspec.to_builtins(facts))
    return [msgspec.convert(one, HostFacts) for one in found]


def _skews() -> list[float]:
    """Seconds by which each rank's clock is ahead of the first one's. Of several questions the one
    with the quickest answer counts: its error is at most half of its way."""
    import torch
    import torch.distributed as dist

    rank, found = dist.get_rank(), [0.0]
    for other in range(1, dist.get_world_size()):
        best = (float("inf"), 0.0)
        for _ in range(CLOCK_ROUNDS if rank in (0, other) else 0):
            stamp = torch.zeros(1, dtype=torch.float64)
            if rank == 0:
                sent = time.time()
                dist.send(stamp, other)
                dist.recv(stamp, other)
                way = time.time() - sent
                best = min(best, (way, float(stamp[0]) - (sent + way / 2)))
            else:
                dist.recv(stamp, 0)
                stamp[0] = time.time()
                dist.send(stamp, 0)
        found.append(best[1])
    return found


def _all_reduce(size: int, device: str) -> AllReduce:
    import torch
    import torch.distributed as dist

    values, ranks = torch.zeros(size // 4, device=device), dist.get_world_size()
    seconds = []
    for _ in range(_ROUNDS + 2):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(values)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    middle = statistics.median(seconds[2:])
    return AllReduce(size, middle, 2 * (ranks - 1) / ranks * size / middle)


# --- findings ----------------------------------------------------------------------------------


def compare(facts: Sequence[HostFacts]) -> Iterator[Finding]:
    """What has to be the same on all hosts."""
    same = {"millrace": "pip install millrace=={}", "torch": "pip install torch=={}",
            "nccl": "pip install nvidia-nccl-cu13=={}"}  # fmt: skip
    for name, command in same.items():
        values = [getattr(one, name) for one in facts]
        if len(set(values)) > 1:
            yield Finding("hosts", name, _each(facts, values), "fail",
                          command.format(max(values)) + " on every host")  # fmt: skip
    if len({one.driver for one in facts}) > 1:
        yield Finding("hosts", "driver", _each(facts, [one.driver for one in facts]), "warn",
                      "apt-get install --only-upgrade nvidia-driver, on every host")  # fmt: skip
    yield from _compare_tables(facts)


def _compare_tables(facts: Sequence[HostFacts]) -> Iterator[Finding]:
    """One NCCL_IB_GID_INDEX serves all hosts only if their tables agree, and MTUs that differ drop
    large frames."""
    for name, advice in (
        ("gids", "unset NCCL_IB_GID_INDEX && export NCCL_IB_ROCE_VERSION_NUM=2, on every host"),
        ("mtus", "ip link set DEVICE mtu 9000, on every host"),
    ):
        tables = [getattr(one, name) for one in facts]
        if any(set(a.values()) != set(b.values()) for a, b in pairwise(tables)):
            texts = [", ".join(f"{k} {v}" for k, v in sorted(table.items())) or "none"
                     for table in tables]  # fmt: skip
            title = "GID indices" if name == "gids" else "MTU"
            yield Finding("hosts", title, _each(facts, texts), "warn", advice)


def _each(facts: Sequence[HostFacts], values: Sequence[str]) -> str:
    lines = (f"{one.host}: {value}" for one, value in zip(facts, values, strict=True))
    return "; ".join(dict.fromkeys(lines))


def clocks(facts: Sequence[HostFacts], skews: Sequence[float]) -> Iterator[Finding]:
    """Of the first rank of each host."""
    first = {one.host: skew for one, skew in reversed(list(zip(facts, skews, strict=True)))}
    for host, skew in sorted(first.items()):
        if host == facts[0].host:
            continue
        value = f"{skew * 1e3:+.1f} ms against {facts[0].host}"
        far = abs(skew) > SKEW_WARNS
        yield Finding("hosts", f"clock of {host}", value, "warn" if far else "ok",
                      "chronyc makestep, on every host" if far else "")  # fmt: skip


def speed(
    facts: Sequence[HostFacts], timings: Sequence[AllReduce], device: str
) -> Iterator[Finding]:
    """The measured all-reduce; the largest one against the slowest link."""
    slowest = min(one.gbits for one in facts) * 1e9 / 8
    for timing in timings:
        size = (
            f"{timing.bytes >> 10} KiB" if timing.bytes < 1 << 20 else f"{timing.bytes >> 20} MiB"
        )
        value = f"{timing.seconds * 1e6:,.0f} us, {timing.bus / 1e9:.2f} GB/s"
        slow = device == "cuda" and timing is timings[-1] and timing.bus < SHARE * slowest
        if slow:
            value += f", of {slowest / 1e9:.0f} that the link has"
        yield Finding("hosts", f"all-reduce of {size}", value, "warn" if slow else "ok",
                      f"NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=NET {START}" if slow else "")  # fmt: skip
