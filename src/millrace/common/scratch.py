"""Temporary directories that do not outlive their process for long.

A process that is killed cannot remove what it made. So each directory is locked by its process,
and whoever makes the next one removes those whose lock is free: the system gives it back when the
process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "millrace-"
_NEW = ".millrace-"  # until it is locked
_LOCK = ".lock"


class ScratchDirectory:
    """A directory that only this user can enter. parent: where it is made, by default the system's
    place for temporary files. `remove` is to be called when it is no longer needed."""

    def __init__(self, parent: Path | None = None) -> None:
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        remove_abandoned(parent)
        new = Path(tempfile.mkdtemp(prefix=_NEW, dir=parent))
        self._lock = os.open(new / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = new.with_name(PREFIX + new.name.removeprefix(_NEW))
        new.rename(self.path)

    def remove(self) -> None:
        """Remove the directory with all that it holds. Removing it again does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_abandoned(parent: Path) -> None:
    """Remove the scratch directories of this user's processes that have ended."""
    for directory in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if directory.is_symlink() or directory.stat().st_uid != os.getuid():
                continue
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(lock)
