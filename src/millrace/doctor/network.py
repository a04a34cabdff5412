"""Checks of the network that ranks of several hosts use: RDMA devices, and what NCCL is told.

RoCE is RDMA over Ethernet. It needs an address of version 2 in the table of the device (a GID), and
frames that hold 4096 bytes beside their headers. What is wrong here is slow, or hangs, elsewhere.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from millrace.doctor.finding import Finding
from millrace.doctor.host import ROOT, gpu_addresses, in_container, number_in

ROCE_MTU = 4200  # of the network device: frames of RDMA are then 4096 bytes


@dataclass(frozen=True, slots=True)
class RdmaPort:
    """A port of an RDMA device. gbits: its rate. gids: index -> address, of RoCE version 2 over
    IPv4. netdev: its network device, and mtu of that; empty and None on InfiniBand."""

    device: str
    number: str
    active: bool
    ethernet: bool
    gbits: float
    gids: dict[int, str]
    netdev: str
    mtu: int | None

    @property
    def name(self) -> str:
        return f"{self.device} port {self.number}"


def rdma_ports(root: Path = ROOT) -> list[RdmaPort]:
    return [_port(root, path) for path in sorted((root / "sys/class/infiniband").glob("*/ports/*"))]


def _port(root: Path, path: Path) -> RdmaPort:
    gids, netdev = {}, ""
    for file in (path / "gid_attrs/types").glob("*"):
        index = file.name
        gid = _text(path / "gids" / index)
        if not gid.strip("0:"):
            continue
        netdev = netdev or _text(path / "gid_attrs/ndevs" / index)
        if "v2" in _text(file) and gid.startswith("0000:0000:0000:0000:0000:ffff:"):
            gids[int(index)] = _address(gid)
    rate = re.match(r"[\d.]+", _text(path / "rate"))
    return RdmaPort(
        device=path.parent.parent.name,
        number=path.name,
        active="ACTIVE" in _text(path / "state"),
        ethernet=_text(path / "link_layer") == "Ethernet",
        gbits=float(rate[0]) if rate else 0.0,
        gids=dict(sorted(gids.items())),
        netdev=netdev,
        mtu=number_in(root / "sys/class/net" / netdev / "mtu") if netdev else None,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _address(gid: str) -> str:
    """Of IPv4, from the last two groups."""
    last = "".join(gid.split(":")[-2:])
    return ".".join(str(int(last[at : at + 2], 16)) for at in range(0, 8, 2))


# --- findings ----------------------------------------------------------------------------------


def network(root: Path = ROOT, environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Every RDMA port, then what NCCL is told by variables, and the limits of RDMA."""
    ports = rdma_ports(root)
    if not ports:
        yield Finding("network", "RDMA", "no device: ranks of several hosts would use sockets")
    for port in ports:
        yield _checked(port, environment)
    yield from _told(root, ports, environment)
    if ports:
        yield _memory_lock(root)
    if ports and gpu_addresses(root) and not in_container(root):
        yield _peer_memory(root)


def _checked(port: RdmaPort, environment: Mapping[str, str]) -> Finding:
    kind = "RoCE" if port.ethernet else "InfiniBand"
    link = port.netdev or "DEVICE"
    if not port.active:
        up = f"ip link set {link} up" if port.ethernet else "systemctl start opensm"
        return Finding("network", port.name, f"{kind}, not active", "warn", up)
    if not port.ethernet:
        return Finding("network", port.name, f"{kind}, {port.gbits:g} Gb/s")
    if not port.gids:
        return Finding("network", port.name, "no GID of RoCE v2: its network device has no IPv4 "
                       "address", "warn", f"ip addr add ADDRESS/24 dev {link}")  # fmt: skip
    first = next(iter(port.gids))
    told = environment.get("NCCL_IB_GID_INDEX", "")
    if told and told != "-1" and told not in {str(index) for index in port.gids}:
        return Finding("network", port.name, f"NCCL_IB_GID_INDEX={told} is no GID of RoCE v2 over "
                       "IPv4", "warn", f"export NCCL_IB_GID_INDEX={first}")  # fmt: skip
    if port.mtu is not None and port.mtu < ROCE_MTU:
        return Finding("network", port.name, f"MTU {port.mtu} of {link} makes frames of RDMA small",
                       "warn", f"ip link set {link} mtu 9000")  # fmt: skip
    return Finding("network", port.name, f"{kind}, {port.gbits:g} Gb/s, GID {first} of RoCE v2 is "
                   f"{port.gids[first]}, MTU {port.mtu}")  # fmt: skip


def _told(root: Path, ports: list[RdmaPort], environment: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that name what is not there."""
    links = sorted(path.name for path in (root / "sys/class/net").glob("*") if path.name != "lo")
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        names = environment.get(variable, "")
        if names and not names.startswith("^") and not _any_matches(names, links):
            usual = links[0] if links else "lo"
            yield Finding("network", variable, f"{names}: there is no such network device", "fail",
                          f"export {variable}={usual}")  # fmt: skip
    devices = sorted({port.device for port in ports})
    wanted = environment.get("NCCL_IB_HCA", "")
    if ports and wanted and not wanted.startswith("^") and not _any_matches(wanted, devices):
        yield Finding("network", "NCCL_IB_HCA", f"{wanted}: there is no such device", "warn",
                      f"export NCCL_IB_HCA={','.join(devices)}")  # fmt: skip
    if ports and environment.get("NCCL_IB_DISABLE", "0") not in ("", "0"):
        yield Finding("network", "NCCL_IB_DISABLE", "RDMA is there, and turned off", "warn",
                      "unset NCCL_IB_DISABLE")  # fmt: skip


def _any_matches(names: str, there: list[str]) -> bool:
    """NCCL's lists: prefixes, or whole names behind a `=`; a port may stand behind a name."""
    exact = names.startswith("=")
    for name in names.lstrip("=").split(","):
        plain = name.partition(":")[0]
        if any(one == plain if exact else one.startswith(plain) for one in there):
            return True
    return False


def _memory_lock(root: Path) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("network", "locked memory", "no limit")
    how = "docker run --ulimit memlock=-1 ..." if in_container(root) else "ulimit -l unlimited"
    return Finding("network", "locked memory", f"{soft >> 10} KiB, and RDMA locks its buffers",
                   "warn", how)  # fmt: skip


def _peer_memory(root: Path) -> Finding:
    """The module by which network devices read the memory of GPUs."""
    modules = _text(root / "proc/modules")
    if re.search(r"^nvidia_peermem ", modules, re.MULTILINE):
        return Finding("network", "GPU memory", "network devices read it (nvidia_peermem)")
    return Finding("network", "GPU memory", "nvidia_peermem is not loaded: data may pass through "
                   "the host", "warn", "modprobe nvidia_peermem")  # fmt: skip
