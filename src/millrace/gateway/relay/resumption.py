"""One stream over one or several replicas: buffered, parsed when a replica fails, then resumed.

An exchange feeds it what replicas send and forwards what it returns. It does not choose replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from millrace.gateway.http.request_info import Kind, RequestInfo, body_for
from millrace.gateway.relay.fast_path import FastPath
from millrace.gateway.resume.continuation import (
    Continuation,
    can_continue,
    continuation_request,
    is_complete,
)
from millrace.gateway.resume.journal import Progress
from millrace.gateway.resume.stream_buffer import ERROR_EVENT, BufferBudget, StreamBuffer
from millrace.gateway.routing.load_account import LoadAccount
from millrace.gateway.routing.replicas import Replica


class Resumption:
    """max_resumptions: how often the stream may be resumed; resumptions: how often it was."""

    def __init__(self, info: RequestInfo, budget: BufferBudget, max_resumptions: int) -> None:
        self._info = info
        self._budget = budget
        self._max_resumptions = max_resumptions
        self._buffer: StreamBuffer | None = None
        self._progress: Progress | None = None
        self._continuation: Continuation | None = None
        self.resumptions = 0

    # --- before and between replicas -------------------------------------------------------------

    @property
    def resuming(self) -> bool:
        """Whether the stream has broken and is to be resumed."""
        return self._progress is not None

    @property
    def output_tokens(self) -> int:
        """Output tokens so far, from which the next replica resumes."""
        return len(self._progress.token_ids) if self._progress is not None else 0

    @property
    def resumable(self) -> bool:
        """Whether the stream could be resumed if a replica were there."""
        if self.resumptions >= self._max_resumptions:
            return False
        return self.resuming or (self._buffer is not None and self._buffer.resumable)

    def start_buffering(self) -> None:
        """A resumable stream begins: buffer it."""
        self._buffer = StreamBuffer(self._budget, strip=not self._info.wants_token_ids)

    def capable(self, replicas: Sequence[Replica]) -> Sequence[Replica]:
        """Those of the replicas that can resume the stream."""
        progress = self._progress
        if progress is None:
            return replicas
        return [r for r in replicas if can_continue(self._info, progress, r.member.kind)]

    def build_request(self, kind: Kind) -> tuple[bytes | None, bytes]:
        """(path, body) for the next replica; path None for the client's own."""
        if self._progress is None:
            return None, body_for(self._info, kind)
        self._continuation = Continuation(self._info, self._progress, kind)
        return continuation_request(self._info, self._progress, kind)

    def interrupt(self) -> bool:
        """The replica has failed: parse what the client has. False: its state is not known."""
        self.resumptions += 1
        self._continuation = None
        if self._progress is None and self._buffer is not None:
            self._progress = self._buffer.progress()
        return self._progress is not None

    def final_bytes(self) -> bytes | None:
        """The stream's last bytes, if only the end is missing; else None."""
        progress = self._progress
        if progress is None or not is_complete(self._info, progress):
            return None
        return Continuation(self._info, progress, "millrace").final_events(self._info.include_usage)

    def close(self) -> None:
        """The stream is over."""
        if self._buffer is not None:
            self._buffer.close()

    # --- from a replica --------------------------------------------------------------------------

    def feed(self, data: bytes) -> bytes:
        """Bytes for the client after this input; see `failure` afterwards."""
        if self._continuation is not None:
            return self._continuation.feed(data)
        return data if self._buffer is None else self._buffer.feed(data)

    @property
    def holds_back(self) -> bool:
        """Whether the client has not got all bytes that have come."""
        return self._buffer is not None and self._buffer.holds_back

    def give_up_buffer(self) -> bytes:
        """Stop buffering: the stream cannot be resumed. Returns the bytes that were held back."""
        return self._buffer.give_up() if self._buffer is not None else b""

    def fast_path(self, account: LoadAccount, write: Callable[[bytes], None]) -> FastPath | None:
        """The fast path for the pieces to come, from between two events; None if there is none."""
        if self._continuation is not None:
            return None
        return FastPath(account, write, self._buffer.journal if self._buffer is not None else None)

    @property
    def failure(self) -> str | None:
        """What is wrong with the input so far; None if nothing is."""
        return self._continuation.failure if self._continuation is not None else None

    def bytes_before_error(self, data: bytes) -> bytes | None:
        """If this input holds an error event of the replica and the stream can be resumed: the
        bytes for the client before it. Else None."""
        if ERROR_EVENT not in data or self._buffer is None or not self.resumable or self.resuming:
            return None
        return self._buffer.bytes_before_error(data)

    def finish(self, data: bytes) -> bytes | None:
        """The response is complete: the remaining bytes for the client; None if its end is
        missing."""
        if self._continuation is None:
            return data if self._buffer is None else self._buffer.finish(data)
        last = self._continuation.feed(data)
        if self._progress is None or not self._progress.done:
            return None
        return last + b"0\r\n\r\n"
