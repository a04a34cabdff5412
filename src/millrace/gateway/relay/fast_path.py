"""The fast path of a stream: for pieces that are one complete HTTP chunk of complete events.

Most pieces are of this kind. Such a piece leaves a parser of the response in the same state, so it
need not be parsed: its first bytes give the chunk size, and the size matches its length. The piece
is buffered where the stream is, token ids that the client did not ask for are removed, and the rest
is written. Any other piece is refused and parsed (replica_connection.py), until the stream is
between two events again.
"""

from __future__ import annotations

from collections.abc import Callable

from millrace.gateway.resume.journal import EVENT_END, Journal, strip_token_ids
from millrace.gateway.resume.stream_buffer import ERROR_EVENT
from millrace.gateway.routing.load_account import LoadAccount

_LONGEST = 4096  # bytes of the longest piece
_BOUND_CHECK_BYTES = 16 * 2**10  # bytes between two checks of the bounds on buffered streams


def _chunk_prefixes() -> list[bytes]:
    """For each length of a piece, its chunk size line if it is one chunk."""
    lines = [b"no piece is so long"] * _LONGEST
    for size in range(1, _LONGEST):
        line = b"%x\r\n" % size
        length = len(line) + size + 2
        if length < _LONGEST:
            lines[length] = line
    return lines


_CHUNK_PREFIXES = _chunk_prefixes()


class FastPath:
    """One stream between its replica and its client. write: the client's. journal: buffers each
    piece and says whether token ids are removed; None where the stream is not buffered."""

    __slots__ = ("_account", "_append", "_next_bound_check", "_strip", "_write")

    def __init__(
        self,
        account: LoadAccount,
        write: Callable[[bytes], None],
        journal: Journal | None,
    ) -> None:
        self._account = account
        self._write = write
        self._append = journal.append if journal is not None else None
        self._strip = journal is not None and journal.strip
        self._next_bound_check = account.bytes + _BOUND_CHECK_BYTES

    def try_forward(self, data: bytes) -> bool:
        """Forward a piece. False: nothing has been done with it, and it must be parsed."""
        length = len(data)
        if length >= _LONGEST:
            return False
        line = _CHUNK_PREFIXES[length]
        if not data.startswith(line) or not data.endswith(EVENT_END) or ERROR_EVENT in data:
            return False
        passed = strip_token_ids(data, len(line) - 2) if self._strip else data
        if passed is None:
            return False
        account = self._account
        if self._append is not None:
            if account.bytes >= self._next_bound_check:
                return False
            self._append(data)
        account.chunks += 1
        account.bytes += length
        self._write(passed)
        return True
