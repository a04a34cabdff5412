"""Log output that never raises into the service, never blocks it, and counts what it loses.

Every line goes through a `LineWriter`: a bounded queue and a thread that writes to one descriptor.
A full disk, a pipe without a reader, a closed descriptor or a reader that stalls cost lines, which
are counted; when the descriptor can be written again, one line says how many were lost.

`protect_standard_streams` puts stdout and stderr on such writers, so `print`, `click.echo`,
`logging` and tracebacks are covered without knowing this module. What the lines say is not known
here.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import select
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import NoReturn, TextIO, cast

MAX_QUEUED_BYTES = 1 << 20
FLUSH_SECONDS = 1.0  # at the end of the process, for lines that are still queued
_writers: weakref.WeakSet[LineWriter] = weakref.WeakSet()
_dropped = 0


def stderr_line(text: str) -> None:
    """Log a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def dropped_lines() -> int:
    """Lines that all writers of this process have lost."""
    return _dropped


def text_notice(lost: int, reason: str) -> bytes:
    """The line that says how many lines were lost, for logs that people read."""
    return f"{lost} log lines were lost ({reason})\n".encode()


class LineWriter:
    """Writes lines to a descriptor in a thread of its own.

    notice: makes the line that reports losses, from their number and the reason. on_failure: called
    with a reason when writing begins to fail; it runs in the thread. dropped: lines lost so far.
    max_queued: bytes that may wait; further lines are lost.
    """

    def __init__(
        self,
        fd: int,
        *,
        notice: Callable[[int, str], bytes] = text_notice,
        on_failure: Callable[[str], None] = lambda reason: None,
        max_queued: int = MAX_QUEUED_BYTES,
    ) -> None:
        self._fd = fd
        self.notice = notice
        self._on_failure = on_failure
        self._max_queued = max_queued
        self.dropped = 0
        self._start()
        _writers.add(self)

    def _start(self) -> None:
        self._wake = threading.Condition()  # its lock is reentrant: a signal handler may log
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._lost = 0  # since the last line that was written
        self._reason = ""
        self._torn = False  # the last write ended within a line
        self._writing = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def write(self, lines: bytes) -> None:
        """Queue complete lines. Never raises, never blocks."""
        with self._wake:
            if self._closed or self._queued + len(lines) > self._max_queued:
                self._lose(lines, "the output takes no more bytes")
                return
            self._queue.append(lines)
            self._queued += len(lines)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # no more threads, or the interpreter is ending
                    self._thread = None
                    self._queue.clear()
                    self._queued = 0
                    self._lose(lines, "no thread can be started")
                    return
            self._wake.notify_all()

    def flush(self, limit: float = FLUSH_SECONDS) -> bool:
        """Wait until everything queued has been written or lost, `limit` seconds at most."""
        end = time.monotonic() + limit
        with self._wake:
            while (self._queue or self._writing) and self._thread is not None:
                left = end - time.monotonic()
                if left <= 0 or not self._thread.is_alive():
                    return False
                self._wake.wait(left)
            return True

    def close(self, limit: float = FLUSH_SECONDS) -> None:
        """Flush, and end the thread. The descriptor stays open."""
        self.flush(limit)
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def reset_after_fork(self) -> None:
        """In a forked child: the thread and the queue are the parent's."""
        self._start()

    # --- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closed:
                    self._wake.wait()
                if not self._queue:
                    return
                data = b"".join(self._queue)
                self._queue.clear()
                self._queued = 0
                self._writing = True
                lost, reason = self._lost, self._reason
            self._write(data, lost, reason)
            with self._wake:
                self._writing = False
                self._wake.notify_all()

    def _write(self, data: bytes, lost: int, reason: str) -> None:
        prefix = b"\n" if self._torn else b""
        if lost:
            with contextlib.suppress(Exception):
                prefix += self.notice(lost, reason)
        whole = prefix + data
        done = 0
        try:
            while done < len(whole):
                done += self._write_some(memoryview(whole)[done:])
        except (OSError, ValueError) as error:
            self._failed(whole, done, len(prefix), data, error)
            return
        self._torn = False
        with self._wake:
            self._lost -= lost

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:  # somebody else made the descriptor non-blocking
            select.select((), (self._fd,), (), 1.0)
            return 0

    def _failed(
        self, whole: bytes, done: int, prefix: int, data: bytes, error: OSError | ValueError
    ) -> None:
        if done:
            self._torn = not whole[:done].endswith(b"\n")
        reason = getattr(error, "strerror", None) or str(error)
        with self._wake:
            first = self._lost == 0
            self._lose(data[max(0, done - prefix) :], reason)
        if first:
            with contextlib.suppress(Exception):
                self._on_failure(reason)

    def _lose(self, lines: bytes, reason: str) -> None:
        global _dropped
        count = max(1, lines.count(b"\n"))
        _dropped += count
        self.dropped += count
        self._lost += count
        self._reason = reason


class ProtectedStream(io.TextIOBase):
    """A text stream on a `LineWriter`; it takes the place of sys.stdout or sys.stderr."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.writer = LineWriter(fd)
        self._line = b""  # of what has been written, the beginning of a line
        self._lock = threading.RLock()
        self.buffer = _ByteStream(self)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.write_bytes(text.encode("utf-8", "backslashreplace"))
        return len(text)

    def write_bytes(self, data: bytes) -> None:
        """Write encoded text; complete lines are passed on at once."""
        with self._lock:
            complete, end, rest = (self._line + data).rpartition(b"\n")
            self._line = rest
            if len(rest) > MAX_QUEUED_BYTES:
                complete, end, self._line = complete + end + rest, b"\n", b""
        if end:
            self.writer.write(complete + end)

    def flush(self) -> None:
        """Pass on the beginning of a line, without waiting for it to be written."""
        with self._lock:
            rest, self._line = self._line, b""
        if rest:
            self.writer.write(rest)

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)


class _ByteStream(io.RawIOBase):
    """The `buffer` of a protected stream."""

    def __init__(self, stream: ProtectedStream) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        encoded = bytes(cast(bytes, data))
        self._stream.write_bytes(encoded)
        return len(encoded)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()


def open_standard_descriptors() -> None:
    """Open descriptors 0 to 2 on /dev/null where they are closed.

    Otherwise the next file or socket would get such a number, and be written to as stdout. To be
    called before anything is opened.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.dup2(opened, fd, inheritable=True)
            if opened != fd:
                os.close(opened)


def protect_standard_streams() -> None:
    """Have sys.stdout and sys.stderr never raise and never block. For processes that serve.

    Streams that something else has replaced already are left alone.
    """
    open_standard_descriptors()
    for name, fd in (("stdout", 1), ("stderr", 2)):
        if _is_standard(getattr(sys, name), fd):
            with contextlib.suppress(Exception):
                getattr(sys, name).flush()
            setattr(sys, name, cast(TextIO, ProtectedStream(fd)))


def exit_at_once(status: int) -> NoReturn:
    """End this process without the interpreter's exit, after its last lines have been written."""
    _flush_all()
    os._exit(status)


def _is_standard(stream: object, fd: int) -> bool:
    if stream is None:  # the descriptor was closed when the interpreter started
        return True
    try:
        return not isinstance(stream, ProtectedStream) and cast(TextIO, stream).fileno() == fd
    except (OSError, ValueError, AttributeError):
        return False


def _flush_all() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, ProtectedStream):
            stream.flush()
    end = time.monotonic() + FLUSH_SECONDS
    for writer in list(_writers):
        writer.flush(max(0.0, end - time.monotonic()))


def _reset_after_fork() -> None:
    for writer in list(_writers):
        writer.reset_after_fork()


atexit.register(_flush_all)
os.register_at_fork(after_in_child=_reset_after_fork)
