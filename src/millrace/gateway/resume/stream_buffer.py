"""A running stream, buffered within the bounds on its size and on all streams.

Above a bound, or with an unsupported framing, the stream passes unbuffered: it cannot be resumed
then, and is counted as unprotected.
"""

from __future__ import annotations

import re

import msgspec

from millrace.common.http_client import error_text
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.common.shared_counters import ProcessCounters
from millrace.gateway.resume.journal import Journal, Progress, parse_progress

ERROR_EVENT = b'data: {"error":'
_SSE_LINE_ENDS = re.compile(rb"\r\n|\r|\n")
_CLIENT_TYPES = re.compile(
    r"bad_?request|invalid|not_?found|unprocessable|authentication|permission|rate_?limit", re.I
)
_LONGEST_ERROR = 4096  # bytes of a first event that are read
_STEP = 16384  # bytes between two checks of the bounds


class StreamError(msgspec.Struct, frozen=True):
    """An error event. by_server: not about the client's request."""

    message: str
    by_server: bool


def first_error(chunks: bytes) -> StreamError | None:
    """The error with which a stream begins, from the first bytes of its chunks; None if it does
    not, or if its first event is not complete."""
    payload = chunks.partition(b"\r\n")[2]
    for line in _SSE_LINE_ENDS.split(payload[:_LONGEST_ERROR]):
        if line.startswith(b"data:"):
            return read_error(line[5:])
    return None


def read_error(data: bytes) -> StreamError | None:
    """The error in an event's data; None if it is not one."""
    try:
        event = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if not isinstance(event, dict) or "choices" in event:
        return None
    error = event.get("error")
    if error is None and event.get("object") == "error":
        error = event
    if not error:
        return None
    fields = error if isinstance(error, dict) else {}
    code, kind = fields.get("code"), str(fields.get("type") or event.get("type") or "")
    status = int(str(code)) if re.fullmatch("[0-9]{3}", str(code)) else 0
    by_client = 400 <= status < 500 if status else bool(_CLIENT_TYPES.search(kind))
    return StreamError(error_text(data), by_server=not by_client)


class BufferBudget:
    """Bounds on one buffered stream and on all of this process. held: bytes buffered now."""

    def __init__(self, limits: GatewayLimits, process_counters: ProcessCounters) -> None:
        self.held = 0
        self._limits = limits
        self._process_counters = process_counters

    def allows(self, size: int, more: int) -> bool:
        """Whether a stream may grow by so many bytes, to that size."""
        limits = self._limits
        return size <= limits.max_kept_bytes and self.held + more <= limits.max_kept_bytes_all

    def add(self, change: int) -> None:
        """Change the bytes held."""
        self.held += change
        self._process_counters.add_gauge("kept_bytes", change)

    def count_unprotected(self) -> None:
        """Count a stream that is no longer buffered while it runs."""
        self._process_counters.count_event("unprotected")


class StreamBuffer:
    """One stream. strip: the client did not ask for token ids."""

    __slots__ = ("_budget", "_counted", "_journal")

    def __init__(self, budget: BufferBudget, strip: bool) -> None:
        self._budget = budget
        self._journal: Journal | None = Journal(strip)
        self._counted = 0

    @property
    def resumable(self) -> bool:
        """Whether everything that the client has is buffered."""
        return self._journal is not None

    @property
    def journal(self) -> Journal | None:
        """Its journal; None once the stream is no longer buffered."""
        return self._journal

    def feed(self, data: bytes) -> bytes:
        """Bytes for the client after this input."""
        journal = self._journal
        if journal is None:
            return data
        passed = journal.feed(data)
        if journal.unsupported_framing or journal.size - self._counted > _STEP:
            passed += self._update_size(journal)
        return passed

    @property
    def holds_back(self) -> bool:
        """Whether the client has not got all bytes that have come."""
        return self._journal is not None and self._journal.holds_back

    def give_up(self) -> bytes:
        """Stop buffering while the stream runs; returns the bytes that were held back."""
        journal = self._journal
        if journal is None:
            return b""
        self._budget.count_unprotected()
        self.close()
        return journal.discard()

    def finish(self, data: bytes) -> bytes:
        """The response is complete: all bytes that the client has not got."""
        return data if self._journal is None else self._journal.finish(data)

    def bytes_before_error(self, data: bytes) -> bytes | None:
        """If this input holds an error event of the replica, the bytes for the client before it;
        else None. Such a stream is treated as broken."""
        if ERROR_EVENT not in data or self._journal is None:
            return None
        event = _SSE_LINE_ENDS.split(data[data.index(ERROR_EVENT) + len(b"data:") :], 1)[0]
        error = read_error(event)
        if error is not None and not error.by_server:
            return None
        line = data.rfind(b"\r\n", 0, data.index(ERROR_EVENT))
        begin = data.rfind(b"\n", 0, line) + 1 if line > 0 else 0
        return self._journal.feed(data[:begin]) if begin else b""

    def progress(self) -> Progress | None:
        """How far the client has come; None if that is not known token by token."""
        progress = parse_progress(self._journal.raw) if self._journal is not None else None
        self.close()
        return progress if progress is not None and progress.resumable else None

    def close(self) -> None:
        """Stop buffering."""
        self._journal = None
        self._add(-self._counted)

    def _update_size(self, journal: Journal) -> bytes:
        """Check the bounds; returns the bytes held back if one is exceeded."""
        more = journal.size - self._counted
        if self._budget.allows(journal.size, more) and not journal.unsupported_framing:
            self._add(more)
            return b""
        return self.give_up()

    def _add(self, change: int) -> None:
        self._counted += change
        self._budget.add(change)
