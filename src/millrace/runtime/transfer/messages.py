"""What two engines say to each other, on a connection that one opens to take records of the other.

Both begin with Hello. Then each Take is answered by Offered or Refused; behind Offered come the
bytes of a part of the record, unless the other side reads them itself. A record whose prompt is
still computed comes in several parts, each with a checksum of its own; nothing of it is of use
before the last one, which has the state. Taken ends it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from millrace.common.framing import Framing
from millrace.runtime.transfer.identity import Identity

Transport = Literal["tcp", "shm", "nixl", "cuda_ipc"]


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """engine: its id. transport: how whoever opens wants the bytes. memory: bytes of the host's
    memory that records lie in. address: where it begins; agent: by whom NIXL reads it. ports: of
    the engine's ranks, each of which hands over its own part. handle: of the memory, where it is a
    GPU's."""

    engine: str
    identity: Identity
    transport: Transport = "tcp"
    memory: int = 0
    address: int = 0
    agent: bytes = b""
    ports: tuple[int, ...] = ()
    handle: bytes = b""


class Take(msgspec.Struct, frozen=True, tag="take"):
    """The record of this name, without its first `skip` pages; pages: how many that leaves.
    seconds: for which it waits until the record is offered. taker: which of `takers` ranks asks,
    each of which needs a part of it."""

    name: str
    skip: int
    pages: int
    seconds: float
    taker: int = 0
    takers: int = 1


class Offered(msgspec.Struct, frozen=True, tag="offered"):
    """The record's next pages: how many bytes, their checksum, and where they lie in the memory
    (at, bytes). final: the rest of it, with its state; else more follows."""

    size: int
    checksum: bytes
    places: list[tuple[int, int]]
    pages: int
    final: bool


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Why there is nothing."""

    why: str


class Taken(msgspec.Struct, frozen=True, tag="taken"):
    """Whether the bytes came whole. The record is no longer needed if they did, or if nobody will
    ask again."""

    whole: bool
    final: bool = True


Message = Hello | Take | Offered | Refused | Taken
LONGEST = 16 << 20
FRAMING: Framing[Message] = Framing(Message, longest=LONGEST)
