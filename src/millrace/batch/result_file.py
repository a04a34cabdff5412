"""A file to which whole lines are appended, and which can be taken back to an earlier size.

After a crash whatever stands behind the last size that is known to be on the disk is cut off and
written again. Which lines those are, the journal knows.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from millrace.errors import UserError


class ResultFile:
    """An open file. size: its bytes, all of them whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._synced = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None

    def lock(self) -> None:
        """Keep other processes from writing it. Raises UserError if one does."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{self.path}: another process is writing it; wait for it, or end it first"
            ) from None

    def found_size(self) -> int:
        """The size on the disk, whatever has been written."""
        return os.fstat(self._fd).st_size

    def cut(self, size: int) -> None:
        """Take the file back to `size` bytes. Raises UserError if it does not have as many."""
        found = self.found_size()
        if found < size:
            raise UserError(
                f"{self.path} has {found} bytes, and {size} have been written: something else "
                "changed it; put it back, or begin anew with another output file"
            )
        os.ftruncate(self._fd, size)
        self.size = size
        self._synced = False

    def append(self, data: bytes) -> None:
        """Write whole lines. Raises OSError; the file may then end with a part of them."""
        view, at = memoryview(data), self.size
        while view:
            written = os.pwrite(self._fd, view, at)
            view, at = view[written:], at + written
        self.size = at
        self._synced = False

    def sync(self) -> None:
        """What was appended survives a loss of power."""
        if not self._synced:
            os.fsync(self._fd)
            self._synced = True

    def close(self) -> None:
        os.close(self._fd)
