"""Checks of the machine: versions, cores, memory, and limits that a server meets."""

from __future__ import annotations

import errno
import os
import platform
import re
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from millrace.doctor.finding import Finding
from millrace.doctor.host import in_container, listener
from millrace.fleet.device_assignment import usable_cores
from millrace.server.engine_link.link import MAX_IPC_PATH
from millrace.version import __version__

GiB = 1 << 30
FILES_NEEDED = 4096
SHARED_NEEDED = 1 * GiB
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def versions() -> Iterator[Finding]:
    """Versions of Millrace, Python, and every package that an installation needs or may use."""
    yield Finding("versions", "millrace", __version__)
    yield Finding("versions", "python", platform.python_version())
    yield Finding("versions", "system", platform.platform())
    for line in metadata.requires("millrace") or []:
        name = re.split(r"[^A-Za-z0-9_.-]", line)[0]
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        if extra and extra.group(1) not in ("gpu", "otel"):
            continue
        yield _package(name, extra.group(1) if extra else None)


def _package(name: str, extra: str | None) -> Finding:
    try:
        return Finding("versions", name, metadata.version(name))
    except metadata.PackageNotFoundError:
        if extra:
            return Finding("versions", name, f"not installed (extra {extra})")
        return Finding("versions", name, "not installed", "fail", "pip install millrace brings it")


def machine() -> Iterator[Finding]:
    """Cores, memory, shared memory and the directory of temporary files."""
    cores, flags = usable_cores(), _cpu_flags()
    yield Finding("machine", "cores", f"{cores} of {os.cpu_count()}")
    yield Finding("machine", "instructions", " ".join(flags) or "none that the kernels use")
    total, free = _memory()
    short = free < 2 * GiB
    yield Finding(
        "machine", "memory", f"{free / GiB:.1f} GiB free of {total / GiB:.1f}",
        "warn" if short else "ok", "end other programs, or use a smaller model" if short else "",
    )  # fmt: skip
    limit = _cgroup_limit()
    if limit is not None and limit < total:
        yield Finding("machine", "memory limit", f"{limit / GiB:.1f} GiB (control group)")
    yield shared_memory()
    yield _temporary_directory()


def _cpu_flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    found = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    have = set(found.group(1).split()) if found else set()
    return [flag for flag in _CPU_FLAGS if flag in have]


def _memory() -> tuple[int, int]:
    """Bytes in total, and bytes that are available."""
    try:
        rows = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.M))
        return int(rows["MemTotal"]) << 10, int(rows["MemAvailable"]) << 10
    except (OSError, KeyError):
        size = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_PHYS_PAGES") * size, os.sysconf("SC_AVPHYS_PAGES") * size


def free_memory() -> int:
    """Bytes that are available, within the limit of the control group."""
    free, limit = _memory()[1], _cgroup_limit()
    return free if limit is None else min(free, limit)


def _cgroup_limit() -> int | None:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def shared_memory() -> Finding:
    """Ranks and NCCL communicate through it; containers have 64 MiB by default."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return Finding("machine", "shared memory", "no /dev/shm", "warn", "ranks need it")
    value = f"{usage.free / GiB:.2f} GiB free of {usage.total / GiB:.2f} in /dev/shm"
    if usage.free >= SHARED_NEEDED:
        return Finding("machine", "shared memory", value)
    advice = "mount -o remount,size=8G /dev/shm"
    if in_container():
        advice = "docker run --shm-size 8g ..., or an emptyDir of medium Memory in Kubernetes"
    return Finding("machine", "shared memory", value, "warn", advice)


def _temporary_directory() -> Finding:
    where = tempfile.gettempdir()
    try:
        with tempfile.TemporaryDirectory(prefix="millrace-") as directory:
            long = len(directory) > MAX_IPC_PATH
    except OSError as error:
        return Finding("machine", "temporary files", f"{where}: {error.strerror}", "fail",
                       "the engine's sockets are there; set TMPDIR")  # fmt: skip
    note = " (too long for sockets, which go to /tmp)" if long else ""
    return Finding("machine", "temporary files", where + note)


def limits(host: str, port: int) -> Iterator[Finding]:
    """Open files, processes, and the port."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else 1 << 30
    few = most < FILES_NEEDED
    yield Finding(
        "limits", "open files", f"{_count(soft)}, which a server raises to {_count(hard)} at most",
        "warn" if few else "ok", f"each client needs one; ulimit -n {FILES_NEEDED}" if few else "",
    )  # fmt: skip
    yield Finding("limits", "processes", _count(resource.getrlimit(resource.RLIMIT_NPROC)[0]))
    try:
        somaxconn = Path("/proc/sys/net/core/somaxconn").read_text().strip()
    except OSError:
        somaxconn = "unknown"
    yield Finding("limits", "connections waiting", f"{somaxconn} (net.core.somaxconn)")
    yield _port(host, port)


def _count(value: int) -> str:
    return "no limit" if value == resource.RLIM_INFINITY else str(value)


def _port(host: str, port: int) -> Finding:
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        who = listener(port) if error.errno == errno.EADDRINUSE else ""
        value = f"{host} port {port}: {error.strerror}" + (f" ({who})" if who else "")
        kill = f"kill {who.rpartition(' ')[2]}, or " if who else ""
        return Finding("limits", "port", value, "fail", f"{kill}choose another --port")
    return Finding("limits", "port", f"{host} port {port} is free")
