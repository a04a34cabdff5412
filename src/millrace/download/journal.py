"""Which bytes of a file that is being downloaded are on the disk, kept beside them.

A journal is one line of JSON, then records of 20 bytes: start, length and CRC-32 of a piece of the
file, and the CRC-32 of these. A record follows its piece, so a killed process loses at most what no
record speaks of. A record of length 0 is a mark: all that stands before it has been synchronised
with the disk. After a loss of power records behind the last mark may speak of bytes that never
reached the disk, so these pieces are read again and compared when the journal is opened.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import zlib
from bisect import bisect_right
from pathlib import Path

_RECORD = struct.Struct("<QII")
_CHECK = struct.Struct("<I")
_SIZE = _RECORD.size + _CHECK.size
SYNC_BYTES = 128 << 20  # bytes between two marks


class Ranges:
    """A set of whole numbers as sorted ranges [start, end) that neither overlap nor touch."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        if start >= end:
            return
        first = bisect_right(self._ends, start - 1)  # the first range that reaches `start`
        last = bisect_right(self._starts, end)  # behind the last one that begins at `end` or before
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def prefix(self) -> int:
        """The first number, from 0, that is missing."""
        return self._ends[0] if self._starts and self._starts[0] == 0 else 0

    def total(self) -> int:
        return sum(self._ends) - sum(self._starts)

    def missing(self, size: int) -> list[tuple[int, int]]:
        """Ranges of [0, size) that are not in the set."""
        edges = [0, *(edge for pair in zip(self._starts, self._ends, strict=True) for edge in pair)]
        edges.append(size)
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [(start, end) for start, end in pairs if start < end]


class Journal:
    """A partial file and its journal, open for writing. Methods may be called by any thread.

    identity: of the remote content. A partial file of another identity or size is begun anew.
    """

    def __init__(self, path: Path, size: int, identity: str) -> None:
        self.path = path
        self.size = size
        self._head = json.dumps({"size": size, "identity": identity}).encode() + b"\n"
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._data = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._log = os.open(self._log_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._done = Ranges()
        self._unsynced = 0
        self._load()

    @property
    def _log_path(self) -> Path:
        return self.path.with_name(self.path.name + ".journal")

    def _load(self) -> None:
        content = _read_all(self._log)
        if not content.startswith(self._head):
            self._begin()
            return
        records, valid = _parse(content, len(self._head))
        os.ftruncate(self._log, valid)  # a torn record at the end
        os.lseek(self._log, 0, os.SEEK_END)
        marks = [index for index, (_, length, _) in enumerate(records) if not length]
        synced = marks[-1] if marks else -1
        for index, (start, length, check) in enumerate(records):
            if index <= synced or self._holds(start, length, check):
                self._done.add(start, start + length)
        os.ftruncate(self._data, self.size)

    def _holds(self, start: int, length: int, check: int) -> bool:
        found = os.pread(self._data, length, start)
        return len(found) == length and zlib.crc32(found) == check

    def _begin(self) -> None:
        os.ftruncate(self._log, 0)
        os.ftruncate(self._data, 0)
        os.ftruncate(self._data, self.size)
        os.lseek(self._log, 0, os.SEEK_SET)
        os.write(self._log, self._head)
        self._done = Ranges()
        self._unsynced = 0

    def restart(self) -> None:
        """Forget all bytes: they turned out to be wrong."""
        with self._lock:
            self._begin()

    def write(self, start: int, piece: bytes | bytearray) -> None:
        """Put bytes that arrived at their place. Raises OSError when the disk is full."""
        _write_all(self._data, piece, start)
        record = _RECORD.pack(start, len(piece), zlib.crc32(piece))
        with self._lock:
            self._append(record)
            self._done.add(start, start + len(piece))
            self._unsynced += len(piece)
            if self._unsynced >= SYNC_BYTES:
                self._sync()

    def sync(self) -> None:
        """What was written survives a loss of power."""
        with self._lock:
            self._sync()

    def _sync(self) -> None:
        os.fdatasync(self._data)
        self._append(_RECORD.pack(0, 0, 0))
        os.fdatasync(self._log)
        self._unsynced = 0

    def _append(self, record: bytes) -> None:
        whole = record + _CHECK.pack(zlib.crc32(record))
        if os.write(self._log, whole) != len(whole):  # the next start cuts the torn record off
            raise OSError(28, os.strerror(28), str(self._log_path))

    def prefix(self) -> int:
        """How many bytes from the file's beginning are there without a gap."""
        with self._lock:
            return self._done.prefix()

    def done(self) -> int:
        """How many bytes are there."""
        with self._lock:
            return self._done.total()

    def missing(self) -> list[tuple[int, int]]:
        """Ranges [start, end) that are not there."""
        with self._lock:
            return self._done.missing(self.size)

    def read(self, start: int, length: int) -> bytes:
        return os.pread(self._data, length, start)

    def finish(self, target: Path) -> None:
        """Give the whole file its name, durably, and remove the journal."""
        os.fsync(self._data)
        self.close()
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.path, target)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._log_path.unlink(missing_ok=True)

    def close(self) -> None:
        for descriptor in (self._data, self._log):
            if descriptor >= 0:
                os.close(descriptor)
        self._data = self._log = -1


def _parse(content: bytes, start: int) -> tuple[list[tuple[int, int, int]], int]:
    """The records of a journal behind its first line, and where the last whole one ends."""
    records = []
    while start + _SIZE <= len(content):
        record = content[start : start + _RECORD.size]
        (check,) = _CHECK.unpack_from(content, start + _RECORD.size)
        if check != zlib.crc32(record):
            break
        records.append(_RECORD.unpack(record))
        start += _SIZE
    return records, start


def _read_all(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _write_all(descriptor: int, piece: bytes | bytearray, start: int) -> None:
    view = memoryview(piece)
    while view:
        written = os.pwrite(descriptor, view, start)
        view, start = view[written:], start + written
