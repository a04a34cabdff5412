"""The short way of a stream: for pieces that are one whole HTTP chunk of whole events, as most are.

Such a piece leaves a parser of the response where it was, so it need not be parsed: the first
bytes say the size, and the size is right. What is kept is noted, token ids that the client did not
ask for are taken out, and the rest is written. Any other piece is refused, and takes the long way
(replica_connection.py), which says when the stream is between two events again.
"""

from __future__ import annotations

from collections.abc import Callable

from millrace.gateway.resume.journal import EVENT_END, Journal, without_ids
from millrace.gateway.resume.stream_buffer import ERROR_EVENT
from millrace.gateway.routing.load_account import LoadAccount

_LONGEST = 4096  # bytes of a piece
_LOOK_EVERY = 16 * 2**10  # bytes between two looks at the bounds on what is kept


def _lines_by_length() -> list[bytes]:
    """For each length of a piece, how it begins if it is one chunk."""
    lines = [b"no piece is so long"] * _LONGEST
    for size in range(1, _LONGEST):
        line = b"%x\r\n" % size
        length = len(line) + size + 2
        if length < _LONGEST:
            lines[length] = line
    return lines


_LINES = _lines_by_length()


class FastPath:
    """One stream between its replica and its client. write: the client's. journal: keeps each
    piece and says whether token ids are to be taken out; None where nothing is kept."""

    __slots__ = ("_account", "_keep", "_look_at", "_strip", "_write")

    def __init__(
        self,
        account: LoadAccount,
        write: Callable[[bytes], None],
        journal: Journal | None,
    ) -> None:
        self._account = account
        self._write = write
        self._keep = journal.note if journal is not None else None
        self._strip = journal is not None and journal.strip
        self._look_at = account.bytes + _LOOK_EVERY

    def take(self, data: bytes) -> bool:
        """Pass a piece on. False: it must take the long way, nothing has been done with it."""
        length = len(data)
        if length >= _LONGEST:
            return False
        line = _LINES[length]
        if not data.startswith(line) or not data.endswith(EVENT_END) or ERROR_EVENT in data:
            return False
        passed = without_ids(data, len(line) - 2) if self._strip else data
        if passed is None:
            return False
        account = self._account
        if self._keep is not None:
            if account.bytes >= self._look_at:
                return False
            self._keep(data)
        account.chunks += 1
        account.bytes += length
        self._write(passed)
        return True
