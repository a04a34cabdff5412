"""Compiles native.cpp for this very processor, and keeps the result in the user's cache.

    python -m millrace.kernels.cpu.build

`make` does this at set-up. Without it the first process that needs the library compiles it in the
background (some 3 seconds) and runs the references until it is there. The file's name is a hash
of all it depends on; it appears by a rename, so no process ever loads half a library.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

log = logging.getLogger("millrace.kernels")

SOURCE = Path(__file__).with_name("native.cpp")
SOURCES = [SOURCE, *sorted(SOURCE.with_name("native").glob("*.h"))]
COMPILE = (
    *("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp-simd", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-pthread", "-shared"),
)
COMPILE_LIMIT = 120.0


def switched_on() -> bool:
    """Whether native code may run at all: MILLRACE_NATIVE=0 turns it off."""
    return os.environ.get("MILLRACE_NATIVE", "1") != "0"


def build() -> Path:
    """The library's path, compiled now if need be. Raises OSError or subprocess.SubprocessError."""
    path = _path()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            library = Path(directory, "native.so")
            _run(_compiler(), *COMPILE, str(SOURCE), "-o", str(library))
            library.rename(path)
    return path


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_LIMIT)


def _compiler() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "g++"


def _path() -> Path:
    """Where the library lies for this source, these options, this compiler and this processor."""
    version = subprocess.run(
        [_compiler(), "--version"], check=True, capture_output=True, text=True
    ).stdout
    parts = [
        *(source.read_text() for source in SOURCES),
        *COMPILE,
        version,
        platform.machine(),
        _processor(),
    ]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "millrace" / f"native-{key}.so"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


class _Slot:
    """The library once it is there, and the thread that makes it."""

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        self.maker: threading.Thread | None = None

    def fill(self) -> None:
        try:
            self.library = ctypes.CDLL(str(build()))
        except (OSError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[:1]
            log.warning("no native CPU kernels, torch's run instead: %s", "".join(reason))


_slot = _Slot()


@functools.cache
def _start() -> None:
    """Load a library that is there already; else have it made in the background."""
    if not switched_on():
        return
    try:
        there = _path().exists()
    except (OSError, subprocess.SubprocessError):
        there = False
    if there:
        _slot.fill()
        return
    log.info("native CPU kernels are being compiled; torch's run until they are there")
    _slot.maker = threading.Thread(target=_slot.fill, name="native-build", daemon=True)
    _slot.maker.start()


def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there are none, or not yet."""
    _start()
    return _slot.library


def main() -> None:
    try:
        print(f"native CPU kernels: {build()}")
    except (OSError, subprocess.SubprocessError) as error:
        text = (getattr(error, "stderr", None) or str(error)).strip()
        print(f"no native CPU kernels, torch's will run: {text[:300]}", file=sys.stderr)


if __name__ == "__main__":
    main()
