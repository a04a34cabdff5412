"""Bytes from a source into partial files: parallel ranges, retries, checks of digests.

Workers take spans of the first files that miss some, write them and note them in the journal. The
caller's thread hashes each file as it grows and gives it its name once the digest is right. It does
not know where bytes come from, nor what folders mean.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import insort
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from millrace.common.backoff import BackoffPolicy
from millrace.download.journal import Journal
from millrace.download.source import Digest, RemoteFile, Source, TransferError
from millrace.errors import UserError

logger = logging.getLogger(__name__)

SPAN_BYTES = 4 << 20, 32 << 20  # fewest and most that a worker asks for at a time
WRITE_BYTES = 256 << 10  # a killed process loses less than this for each worker
PROGRESS_BYTES = 64 << 10  # a try that brings as much is no failure, however it ends
HASH_BYTES = 4 << 20
WRONG_DIGESTS = 3  # as many wrong bodies of one file are the source's fault


@dataclass(frozen=True, slots=True)
class Limits:
    """workers: connections. tries: failures in a row of one file without progress that end the
    download. slowest: bytes per second; a connection that brings less for `patience` seconds is
    given up and opened again."""

    workers: int = 8
    tries: int = 10
    slowest: float = 16 << 10
    patience: float = 30.0
    backoff: BackoffPolicy = field(default_factory=lambda: BackoffPolicy(first=0.5, longest=30.0))


@dataclass(eq=False)
class Part:
    """A file on its way. target: its name once it is whole. free: ranges, in order, that miss and
    that no worker fetches. at: when it may be asked for again after failures, by time.monotonic().
    """

    file: RemoteFile
    journal: Journal
    target: Path
    free: list[tuple[int, int]] = field(default_factory=list)
    in_flight: int = 0
    failures: int = 0
    wrong: int = 0
    at: float = 0.0

    def __post_init__(self) -> None:
        self.refill()

    def refill(self) -> None:
        """Let workers fetch whatever the journal misses."""
        self.free = self.journal.missing()


class Fetcher:
    """Fetches parts, in their order. on_bytes: called with the count of bytes that arrived, or, of
    bytes that turned out to be wrong, with minus their count; by any thread. on_file: called with
    each file that has its name now; where the source has no digest, with that of what arrived."""

    def __init__(
        self,
        source: Source,
        parts: list[Part],
        limits: Limits,
        on_bytes: Callable[[int], None],
        on_file: Callable[[RemoteFile], None],
    ) -> None:
        self._source = source
        self._parts = parts
        self._limits = limits
        self._on_bytes = on_bytes
        self._on_file = on_file
        self._change = threading.Condition()
        self._open = list(parts)
        self._fatal: BaseException | None = None
        self._stopping = False

    def run(self) -> None:
        """Fetch everything. Raises UserError when that cannot be done, OSError of the disk; what
        has arrived by then is kept for the next time."""
        threads = [
            threading.Thread(target=self._work, name=f"download-{number}", daemon=True)
            for number in range(self._limits.workers)
        ]
        for thread in threads:
            thread.start()
        try:
            for part in self._parts:
                self._complete(part)
        finally:
            self._stop()
            for thread in threads:  # a connection that is silent is left to the process's end
                thread.join(timeout=1.0)
            self._keep()

    def _stop(self) -> None:
        with self._change:
            self._stopping = True
            self._change.notify_all()

    def _keep(self) -> None:
        for part in self._open:
            with suppress(OSError):  # a full disk, perhaps; the journal says what is there
                part.journal.sync()

    # --- the caller's thread: digests -----------------------------------------------------------

    def _complete(self, part: Part) -> None:
        while not self._is_right(part):
            part.wrong += 1
            if part.wrong >= WRONG_DIGESTS:
                raise UserError(
                    f"{part.file.name}: {part.wrong} times the right number of bytes with a wrong "
                    f"digest; the source, or a proxy on the way, changes them"
                )
            logger.warning("%s: the digest is wrong; fetching it again", part.file.name)
            with self._change:
                self._on_bytes(-part.journal.done())
                part.journal.restart()
                part.refill()
                self._change.notify_all()
        part.journal.finish(part.target)
        with self._change:
            self._open.remove(part)
        self._on_file(part.file)

    def _is_right(self, part: Part) -> bool:
        """Wait for all bytes of a part; whether they have its digest. Without one, they get it."""
        digest = part.file.digest or Digest("sha256", "")
        hasher = digest.hasher(part.file.size)
        position = 0
        while position < part.file.size:
            self._wait_for(part, position)
            piece = part.journal.read(position, min(HASH_BYTES, part.journal.prefix() - position))
            hasher.update(piece)
            position += len(piece)
        self._wait_until(lambda: not part.in_flight)
        if part.file.digest is None:
            part.file = replace(part.file, digest=Digest("sha256", hasher.hexdigest()))
        return part.file.digest == Digest(digest.algorithm, hasher.hexdigest())

    def _wait_for(self, part: Part, position: int) -> None:
        self._wait_until(lambda: part.journal.prefix() > position)

    def _wait_until(self, ready: Callable[[], bool]) -> None:
        with self._change:
            while not ready():
                if self._fatal is not None:
                    raise self._fatal
                self._change.wait(timeout=1.0)

    # --- workers --------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (taken := self._take()) is not None:
                self._fetch(*taken)
        except BaseException as error:  # raised by the caller's thread
            with self._change:
                self._fatal = self._fatal or error
                self._change.notify_all()

    def _take(self) -> tuple[Part, int, int] | None:
        """The next span to fetch; waits while there is none. None when the download ends."""
        with self._change:
            while not self._stopping and self._fatal is None:
                now = time.monotonic()
                for part in self._open:
                    if part.at <= now and (span := self._span(part)) is not None:
                        part.in_flight += 1
                        return part, *span
                waits = [part.at - now for part in self._open if part.free and part.at > now]
                self._change.wait(timeout=min([*waits, 1.0]))
            return None

    def _span(self, part: Part) -> tuple[int, int] | None:
        if not part.free:
            return None
        if not self._source.has_ranges(part.file):  # one stream, from the first byte that misses
            if part.in_flight:
                return None
            start = part.free[0][0]
            part.free.clear()
            return start, part.file.size
        start, end = part.free.pop(0)
        fewest, most = SPAN_BYTES
        share = part.file.size // (2 * self._limits.workers)
        middle = min(start + min(max(share, fewest), most), end)
        if middle < end:
            part.free.insert(0, (middle, end))
        return start, middle

    def _fetch(self, part: Part, start: int, end: int) -> None:
        writer = _Writer(part.journal, start, self._written)
        failure: TransferError | None = None
        try:
            with closing(
                _watched(self._source.read(part.file, start, end), self._limits)
            ) as pieces:
                for piece in pieces:
                    writer.add(piece)
                    if self._stopping:
                        break
        except TransferError as error:
            failure = error
        finally:
            try:
                writer.flush()  # what came before a failure counts
            finally:
                self._return(part, writer.position, end, writer.position - start, failure)

    def _written(self, count: int) -> None:
        self._on_bytes(count)
        with self._change:
            self._change.notify_all()

    def _return(
        self, part: Part, start: int, end: int, arrived: int, failure: TransferError | None
    ) -> None:
        """Give back what a worker did not fetch of its span."""
        with self._change:
            part.in_flight -= 1
            if start < end:
                insort(part.free, (start, end))
            if arrived >= PROGRESS_BYTES or start == end:
                part.failures = 0
            if failure is not None:
                self._count(part, failure)
            self._change.notify_all()

    def _count(self, part: Part, failure: TransferError) -> None:
        now = time.monotonic()
        if now >= part.at:  # else other connections failed with this one: that is one failure
            part.failures += 1
        if part.failures > self._limits.tries:
            raise UserError(
                f"{part.file.name}: {part.failures} tries in a row failed, the last one because: "
                f"{failure}; what arrived is kept, and the same command goes on from there"
            )
        wait = failure.wait
        if wait is None:
            wait = self._limits.backoff.pause(part.failures)
        part.at = max(part.at, now + wait)
        logger.info("%s: %s; again in %.1f s", part.file.name, failure, wait)


class _Writer:
    """Bytes of a span, gathered into pieces that are worth a record of the journal. position: how
    far the file is written."""

    def __init__(self, journal: Journal, start: int, written: Callable[[int], None]) -> None:
        self.position = start
        self._journal = journal
        self._written = written
        self._buffer = bytearray()
        self._flushed_at = time.monotonic()

    def add(self, piece: bytes) -> None:
        self._buffer += piece
        if len(self._buffer) >= WRITE_BYTES or time.monotonic() - self._flushed_at > 1.0:
            self.flush()

    def flush(self) -> None:
        self._flushed_at = time.monotonic()
        if self._buffer:
            self._journal.write(self.position, self._buffer)
            self.position += len(self._buffer)
            self._written(len(self._buffer))
            self._buffer = bytearray()


def _watched(pieces: Iterator[bytes], limits: Limits) -> Generator[bytes, None, None]:
    """Pieces of a connection that is given up when it brings too few bytes for too long."""
    begun, count = time.monotonic(), 0
    for piece in pieces:
        yield piece
        count += len(piece)
        seconds = time.monotonic() - begun
        if seconds >= limits.patience:
            if count < limits.slowest * seconds:
                raise TransferError(f"{count} bytes in {seconds:.0f} s: too slow", 0.0)
            begun, count = time.monotonic(), 0
