"""One stream's way over one replica or several: kept, read when a replica fails, gone on with.

An exchange gives it what replicas say, and passes on what it returns. It decides nothing about who
is picked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from millrace.gateway.http.request_info import Kind, RequestInfo, worded
from millrace.gateway.relay.fast_path import FastPath
from millrace.gateway.resume.continuation import (
    Continuation,
    can_continue,
    continuing_request,
    whole_already,
)
from millrace.gateway.resume.journal import Progress
from millrace.gateway.resume.stream_buffer import ERROR_EVENT, BufferBudget, StreamBuffer
from millrace.gateway.routing.load_account import LoadAccount
from millrace.gateway.routing.replicas import Replica


class Resumption:
    """most: moves that the stream may take. moves: how often it has gone to another replica."""

    def __init__(self, info: RequestInfo, room: BufferBudget, most: int) -> None:
        self._info = info
        self._room = room
        self._most = most
        self._buffer: StreamBuffer | None = None
        self._progress: Progress | None = None
        self._continuation: Continuation | None = None
        self.moves = 0

    # --- before and between replicas -------------------------------------------------------------

    @property
    def moving(self) -> bool:
        """Whether the stream has been read, to be gone on with elsewhere."""
        return self._progress is not None

    @property
    def made(self) -> int:
        """Output tokens that the next replica goes on from."""
        return len(self._progress.token_ids) if self._progress is not None else 0

    @property
    def possible(self) -> bool:
        """Whether the stream can go on elsewhere, as far as it goes by itself."""
        if self.moves >= self._most:
            return False
        return self.moving or (self._buffer is not None and self._buffer.resumable)

    def keep(self) -> None:
        """A stream begins that can be resumed: keep it."""
        self._buffer = StreamBuffer(self._room, strip=not self._info.wants_ids)

    def able(self, replicas: Sequence[Replica]) -> Sequence[Replica]:
        """Those of the replicas that could go on."""
        progress = self._progress
        if progress is None:
            return replicas
        return [r for r in replicas if can_continue(self._info, progress, r.member.kind)]

    def question(self, kind: Kind) -> tuple[bytes | None, bytes]:
        """(path, body) for the next replica; path None for the request's own."""
        if self._progress is None:
            return None, worded(self._info, kind)
        self._continuation = Continuation(self._info, self._progress, kind)
        return continuing_request(self._info, self._progress, kind)

    def leave(self) -> bool:
        """The replica has failed: read what the client has. False: it is not known."""
        self.moves += 1
        self._continuation = None
        if self._progress is None and self._buffer is not None:
            self._progress = self._buffer.progress()
        return self._progress is not None

    def ending(self) -> bytes | None:
        """The stream's end, if that is all that is missing."""
        progress = self._progress
        if progress is None or not whole_already(self._info, progress):
            return None
        return Continuation(self._info, progress, "millrace").ending(self._info.include_usage)

    def close(self) -> None:
        """The stream is over."""
        if self._buffer is not None:
            self._buffer.close()

    # --- from a replica --------------------------------------------------------------------------

    def take(self, data: bytes) -> bytes:
        """What the client gets now that this has come; see `trouble` afterwards."""
        if self._continuation is not None:
            return self._continuation.take(data)
        return data if self._buffer is None else self._buffer.take(data)

    def fast_path(self, account: LoadAccount, write: Callable[[bytes], None]) -> FastPath | None:
        """The short way for the pieces to come, from between two events. None: there is none."""
        if self._continuation is not None:
            return None
        return FastPath(account, write, self._buffer.journal if self._buffer is not None else None)

    @property
    def trouble(self) -> str | None:
        """What is wrong with what was taken."""
        return self._continuation.failure if self._continuation is not None else None

    def before_error(self, data: bytes) -> bytes | None:
        """If this brings an error of the replica's own, and the stream can go on elsewhere: what
        the client gets before it. Else None."""
        if ERROR_EVENT not in data or self._buffer is None or not self.possible or self.moving:
            return None
        return self._buffer.before_error(data)

    def finish(self, data: bytes) -> bytes | None:
        """The response is whole with this: what the client gets. None: its end is missing."""
        if self._continuation is None:
            return data if self._buffer is None else self._buffer.rest(data)
        words = self._continuation.take(data)
        if self._progress is None or not self._progress.done:
            return None
        return words + b"0\r\n\r\n"
