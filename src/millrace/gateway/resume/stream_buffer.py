"""A stream kept while it runs, within the bounds on what may be kept.

Above a bound, or in a framing that cannot be followed, the stream is passed on and no longer kept:
it cannot be resumed then, and that is counted.
"""

from __future__ import annotations

from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.common.shared_counters import Part
from millrace.gateway.resume.journal import Journal, Progress, read_progress

ERROR_EVENT = b'data: {"error":'
_CLIENTS_FAULT = b'"type":"invalid_request_error"'
_STEP = 16384  # bytes after which the bounds are looked at again


class BufferBudget:
    """What may be kept of one stream, and of all streams of this process. held: bytes kept now."""

    def __init__(self, limits: GatewayLimits, part: Part) -> None:
        self.held = 0
        self._limits = limits
        self._part = part

    def takes(self, size: int, more: int) -> bool:
        """Whether a stream may grow by so many bytes, to that size."""
        limits = self._limits
        return size <= limits.max_kept and self.held + more <= limits.all_kept

    def add(self, change: int) -> None:
        """A stream keeps so many bytes more, or fewer."""
        self.held += change
        self._part.live("kept_bytes", change)

    def given_up(self) -> None:
        """A stream is kept no longer while it runs."""
        self._part.event("unprotected")


class StreamBuffer:
    """One stream. strip: the client did not ask for token ids."""

    __slots__ = ("_counted", "_journal", "_room")

    def __init__(self, room: BufferBudget, strip: bool) -> None:
        self._room = room
        self._journal: Journal | None = Journal(strip)
        self._counted = 0

    @property
    def resumable(self) -> bool:
        """Whether everything that the client has is kept."""
        return self._journal is not None

    @property
    def journal(self) -> Journal | None:
        """What keeps it; None once nothing is kept any more."""
        return self._journal

    def take(self, data: bytes) -> bytes:
        """What the client gets now that this has come."""
        journal = self._journal
        if journal is None:
            return data
        passed = journal.take(data)
        if journal.broken or journal.size - self._counted > _STEP:
            passed += self._count(journal)
        return passed

    def rest(self, data: bytes) -> bytes:
        """The response is whole with this: what the client has not got."""
        return data if self._journal is None else self._journal.rest(data)

    def before_error(self, data: bytes) -> bytes | None:
        """If this brings an error of the replica's own, what the client gets before it, else None.
        Such a stream is as good as a broken one."""
        if ERROR_EVENT not in data or _CLIENTS_FAULT in data or self._journal is None:
            return None
        line = data.rfind(b"\r\n", 0, data.index(ERROR_EVENT))
        begin = data.rfind(b"\n", 0, line) + 1 if line > 0 else 0
        return self._journal.take(data[:begin]) if begin else b""

    def progress(self) -> Progress | None:
        """How far the client has come; None if that is not known token by token."""
        progress = read_progress(self._journal.raw) if self._journal is not None else None
        self.close()
        return progress if progress is not None and progress.resumable else None

    def close(self) -> None:
        """Keep nothing any more."""
        self._journal = None
        self._add(-self._counted)

    def _count(self, journal: Journal) -> bytes:
        """Look at the bounds; returns what was held back if they are passed."""
        more = journal.size - self._counted
        if self._room.takes(journal.size, more) and not journal.broken:
            self._add(more)
            return b""
        self._room.given_up()
        self.close()
        return journal.give_up()

    def _add(self, change: int) -> None:
        self._counted += change
        self._room.add(change)
