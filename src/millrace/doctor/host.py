"""Checks of what lies between an operating system and its GPUs: containers, memory nodes, ports.

It reads /proc and /sys below a root, and asks programs on PATH. It knows no model and no server.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from millrace.doctor.finding import Finding

ROOT = Path("/")
TIMEOUT = 10.0  # seconds that a program may take to answer
_INSTALL = "apt-get install -y nvidia-container-toolkit"
_CONFIGURE = "nvidia-ctk runtime configure --runtime=docker && systemctl restart docker"


def in_container(root: Path = ROOT) -> bool:
    marks = (root / ".dockerenv", root / "run/.containerenv")
    return any(mark.exists() for mark in marks) or "KUBERNETES_SERVICE_HOST" in os.environ


def gpu_addresses(root: Path = ROOT) -> list[str]:
    """PCI addresses of NVIDIA's GPUs, as its driver lists them."""
    return sorted(path.name for path in (root / "proc/driver/nvidia/gpus").glob("*"))


def said(*command: str) -> str | None:
    """What a program prints; None: it is not on PATH, fails, or does not answer in time."""
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True,
                              timeout=TIMEOUT, stdin=subprocess.DEVNULL)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def number_in(path: Path) -> int | None:
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


# --- containers --------------------------------------------------------------------------------


def containers(root: Path = ROOT) -> Iterator[Finding]:
    """Whether containers get the GPUs; nothing where there is no GPU, no Docker, or a container."""
    if not gpu_addresses(root) or in_container(root) or shutil.which("docker") is None:
        return
    version = said("nvidia-ctk", "--version")
    if version is None:
        yield Finding("containers", "toolkit", "no nvidia-ctk: containers see no GPU", "warn",
                      f"{_INSTALL} && {_CONFIGURE}")  # fmt: skip
        return
    number = re.search(r"\d+(\.\d+)+", version)
    yield Finding("containers", "toolkit", number[0] if number else version.strip())
    runtimes = said("docker", "info", "--format", "{{json .Runtimes}}")
    if runtimes is None:
        yield Finding(
            "containers", "docker", "it does not answer", "warn", "systemctl start docker"
        )
    elif "nvidia" in _names(runtimes) or _has_device_files(root):
        yield Finding("containers", "docker", "it gives GPUs to containers")
    else:
        yield Finding("containers", "docker", "it has no nvidia runtime: --gpus is refused", "warn",
                      _CONFIGURE)  # fmt: skip


def _names(runtimes: str) -> set[str]:
    try:
        return set(json.loads(runtimes) or ())
    except (json.JSONDecodeError, TypeError):
        return set()


def _has_device_files(root: Path) -> bool:
    """Whether the GPUs are described by the container device interface, which Docker reads too."""
    return any(any((root / folder).glob("*nvidia*")) for folder in ("etc/cdi", "var/run/cdi"))


# --- memory nodes ------------------------------------------------------------------------------


def memory_nodes(root: Path = ROOT, cores: frozenset[int] | None = None) -> Iterator[Finding]:
    """Where memory and GPUs are. cores: that this process may run on; None: ask for them."""
    nodes = _nodes(root)
    if len(nodes) < 2:
        yield Finding("machine", "NUMA", f"{len(nodes) or 1} node")
        return
    mine = frozenset(os.sched_getaffinity(0)) if cores is None else cores
    near = [number for number, cpus in nodes.items() if cpus & mine]
    yield Finding("machine", "NUMA", f"{len(nodes)} nodes, this process may run on "
                  f"{', '.join(map(str, near))}")  # fmt: skip
    if number_in(root / "proc/sys/kernel/numa_balancing"):
        yield Finding("machine", "NUMA balancing", "on: it moves memory while engines run", "warn",
                      "sysctl -w kernel.numa_balancing=0")  # fmt: skip
    for address in gpu_addresses(root):
        yield _gpu_node(root, address, nodes, near)


def _gpu_node(
    root: Path, address: str, nodes: dict[int, frozenset[int]], near: list[int]
) -> Finding:
    file = Path("sys/bus/pci/devices") / address / "numa_node"
    node, title = number_in(root / file), f"gpu {address}"
    if node is None or node not in nodes:
        return Finding("machine", title, "its NUMA node is unknown", "warn",
                       f"echo NODE > /{file}, by the mainboard's manual")  # fmt: skip
    if node in near:
        return Finding("machine", title, f"NUMA node {node}")
    return Finding("machine", title, f"NUMA node {node}, where this process may not run", "warn",
                   f"numactl --cpunodebind={node} --membind={node} millrace serve ...")  # fmt: skip


def _nodes(root: Path) -> dict[int, frozenset[int]]:
    """Node -> its cores; nodes without cores are memory alone."""
    found = {}
    for path in sorted((root / "sys/devices/system/node").glob("node[0-9]*")):
        try:
            cores = _list((path / "cpulist").read_text())
        except OSError:
            continue
        if cores:
            found[int(path.name[4:])] = cores
    return found


def _list(text: str) -> frozenset[int]:
    """Numbers of a list such as 0-3,8."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


# --- ports -------------------------------------------------------------------------------------


def listener(port: int, root: Path = ROOT) -> str:
    """Who listens on a TCP port, such as `python3, process 12`; empty if that cannot be seen."""
    sockets = {
        words[9]
        for table in ("tcp", "tcp6")
        for words in _rows(root / "proc/net" / table)
        if len(words) > 9 and words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port
    }
    wanted = {f"socket:[{inode}]" for inode in sockets}
    for path in (root / "proc").glob("[0-9]*"):
        if wanted and wanted & _open_files(path):
            return f"{_name(path)}, process {path.name}"
    return ""


def _rows(path: Path) -> list[list[str]]:
    try:
        return [line.split() for line in path.read_text().splitlines()[1:]]
    except OSError:
        return []


def _open_files(process: Path) -> set[str]:
    found = set()
    try:
        for file in (process / "fd").iterdir():
            found.add(os.readlink(file))
    except OSError:  # another user's, or one that ends
        pass
    return found


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return "a program"


def outgoing(port: int, root: Path = ROOT) -> Iterator[Finding]:
    """Whether outgoing connections may take the port first."""
    try:
        text = (root / "proc/sys/net/ipv4/ip_local_port_range").read_text()
        low, high = map(int, text.split())
        kept = _list((root / "proc/sys/net/ipv4/ip_local_reserved_ports").read_text())
    except (OSError, ValueError):
        return
    if low <= port <= high and port not in kept:
        yield Finding(
            "limits", "outgoing ports", f"{low} to {high}: connections may take port {port} first",
            "warn", f"sysctl -w net.ipv4.ip_local_reserved_ports={port}",
        )  # fmt: skip
