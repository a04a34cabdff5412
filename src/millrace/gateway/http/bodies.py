"""Bodies of requests in memory: how large each may be, and all of a process together.

A body counts from its first byte until its request has been answered, for it is kept so long: it
may have to go to another replica.
"""

from __future__ import annotations

from collections import deque

from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.common.shared_counters import Part
from millrace.gateway.http.message import Answer, error_answer


class BodyBudget:
    """What bodies may take in this process. held: bytes that they take now."""

    def __init__(self, limits: GatewayLimits, part: Part) -> None:
        self.held = 0
        self._limits = limits
        self._part = part

    def refusal(self, size: int, more: int) -> Answer | None:
        """What a client is told whose body may not grow by so many bytes, to that size."""
        limits = self._limits
        if size > limits.max_body:
            message = f"the body is larger than {limits.max_body} bytes, which is --max-body-bytes"
            return error_answer(413, message, close=True)
        if self.held + more > limits.all_bodies:
            self._part.event("body_refused")
            message = (
                f"bodies of {limits.all_bodies} bytes are held already, as many as "
                "--max-bodies-bytes allows; try again later"
            )
            return error_answer(503, message, retry_after=1, close=True, code="too_many_bytes")
        return None

    def add(self, change: int) -> None:
        """Bodies take so many bytes more, or fewer."""
        self.held += change
        self._part.live("body_bytes", change)


class Bodies:
    """Those of one connection, in their order. size: bytes of the one that is coming in."""

    def __init__(self, room: BodyBudget) -> None:
        self._room = room
        self._pieces: list[bytes] = []
        self.size = 0
        self._whole: deque[int] = deque()  # sizes of those that are not answered yet

    def take(self, piece: bytes) -> Answer | None:
        """More of a body has come. Returns the refusal where it does not fit: it is dropped."""
        refusal = self._room.refusal(self.size + len(piece), len(piece))
        if refusal is not None:
            self.drop()
            return refusal
        self._pieces.append(piece)
        self.size += len(piece)
        self._room.add(len(piece))
        return None

    def end(self) -> bytes:
        """The body that came in; it is whole."""
        body = b"".join(self._pieces)
        self._whole.append(self.size)
        self._pieces, self.size = [], 0
        return body

    def drop(self) -> None:
        """Forget the body that is coming in."""
        self._room.add(-self.size)
        self._pieces, self.size = [], 0

    def answered(self) -> None:
        """The oldest whole body's request has been answered."""
        self._room.add(-self._whole.popleft())

    def close(self) -> None:
        """The connection is gone, and all of its bodies."""
        self.drop()
        while self._whole:
            self.answered()
