"""Compiles native.cpp for this processor, and keeps the library in the user's cache.

    python -m millrace.kernels.cpu.build

`make` does this at set-up. Otherwise the first process that needs the library compiles it in the
background (about 3 seconds) and runs the references until it is ready. The file's name is a hash of
everything that it depends on. It is renamed into place, so no process loads half a library.
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


def is_enabled() -> bool:
    """Whether native code may run at all: MILLRACE_NATIVE=0 turns it off."""
    return os.environ.get("MILLRACE_NATIVE", "1") != "0"


def build() -> Path:
    """The library's path; compiles it if necessary. Raises OSError or
    subprocess.SubprocessError."""
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
    """The library's path for this source, these options, this compiler and this processor."""
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


class LibraryState:
    """The library once it is loaded, and the thread that compiles it."""

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        self.thread: threading.Thread | None = None

    def fill(self) -> None:
        try:
            self.library = ctypes.CDLL(str(build()))
        except (OSError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[:1]
            log.warning("no native CPU kernels; torch's ops run instead: %s", "".join(reason))


_state = LibraryState()


@functools.cache
def _start() -> None:
    """Load the library if it is compiled already; else compile it in the background."""
    if not is_enabled():
        return
    try:
        there = _path().exists()
    except (OSError, subprocess.SubprocessError):
        there = False
    if there:
        _state.fill()
        return
    log.info("native CPU kernels are being compiled; torch's ops run until they are ready")
    _state.thread = threading.Thread(target=_state.fill, name="native-build", daemon=True)
    _state.thread.start()


def wait_until_built() -> None:
    """Wait for a compilation in the background, if there is one."""
    if _state.thread is not None:
        _state.thread.join()


def library() -> ctypes.CDLL | None:
    """The compiled library; None if there is none, or not yet."""
    _start()
    return _state.library


def main() -> None:
    try:
        print(f"native CPU kernels: {build()}")
    except (OSError, subprocess.SubprocessError) as error:
        text = (getattr(error, "stderr", None) or str(error)).strip()
        print(f"no native CPU kernels; torch's ops will run: {text[:300]}", file=sys.stderr)


if __name__ == "__main__":
    main()
