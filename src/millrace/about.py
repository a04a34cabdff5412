"""What runs here, for `millrace --version`: the commit, torch, the devices, and the system.

All of it is read from files, so that the answer comes at once: torch is not imported, and no driver
is started.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from millrace.version import __version__

MACHINES = ("x86_64", "aarch64")
GPUS = Path("/proc/driver/nvidia/gpus")


def unsupported_system() -> str | None:
    """A line that says why this system cannot run Millrace, and what can; None if it can."""
    machine = platform.machine()
    if sys.platform == "linux" and machine in MACHINES:
        return None
    return (
        f"this is {platform.system() or sys.platform} on {machine or 'an unknown processor'}, and "
        "Millrace runs on Linux on x86-64 and aarch64; use such a host, a container, or WSL2"
    )


def describe() -> str:
    """The text of `millrace --version`."""
    found = commit()
    return "\n".join(
        [
            f"millrace {__version__}" + (f" (commit {found})" if found else ""),
            f"Python {platform.python_version()}, torch {_torch()}",
            f"device: {device()}",
        ]
    )


def commit() -> str:
    """The commit that this package was built from, or of the checkout; empty if unknown."""
    package = Path(__file__).resolve().parent
    built = package / "commit.txt"
    if built.is_file():
        return built.read_text(encoding="utf-8").strip()
    root = package.parents[1]
    if not (root / "pyproject.toml").is_file() or not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "rev-parse", "--short=9", "HEAD"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=5.0)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def device() -> str:
    """The GPUs that the NVIDIA driver lists, else the processor."""
    found = Counter(
        name for card in sorted(GPUS.glob("*/information")) if (name := _entry(card, "Model"))
    )
    if found:
        return ", ".join(f"{count} x {name}" for name, count in found.items())
    name = _entry(Path("/proc/cpuinfo"), "model name") or platform.machine()
    return f"cpu ({name}, {len(os.sched_getaffinity(0))} cores)"


def _torch() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return "is not installed"


def _entry(path: Path, name: str) -> str:
    """The value of the first line `name : value`; empty if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(values, "")
