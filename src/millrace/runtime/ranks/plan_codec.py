"""Rank 0's messages to the other ranks as bytes: each has its number and a digest of all so far.

A rank that missed or misread one finds out before it runs it. How the bytes travel is not known
here (ranks.py): a message is a first piece of one size for all, and a rest if it is longer.
"""

from __future__ import annotations

import hashlib
import struct

import msgspec

from millrace.protocol import ToRank


class MeasureSums(msgspec.Struct, frozen=True, tag="measure"):
    """Take part in measuring sums over messages of so many tokens."""

    rows: list[int]


Message = ToRank | MeasureSums
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode

FIRST = 2048  # bytes of the first piece
# It begins with the message's length, its number, and a digest of all messages so far.
_HEADER = struct.Struct("<IQ8s")


class OtherPlanError(Exception):
    """The message is not the one that rank 0 has sent in this place; says how it differs."""


class Plans:
    """The messages sent or received so far. number: how many."""

    def __init__(self) -> None:
        self.number = 0
        self._digest = bytes(8)

    def pack(self, message: Message) -> bytearray:
        """The next message: its first piece, and the rest behind it."""
        body = _encode(message)
        self._advance(body)
        return bytearray(_HEADER.pack(len(body), self.number, self._digest) + body)

    @staticmethod
    def rest(first: bytes) -> int:
        """Bytes that follow the first piece."""
        length: int = _HEADER.unpack_from(first)[0]
        return max(0, length - (FIRST - _HEADER.size))

    def unpack(self, data: bytes) -> Message:
        """The next message, from its first piece and its rest. Raises OtherPlanError."""
        length, number, digest = _HEADER.unpack_from(data)
        body = data[_HEADER.size :][:length]
        self._advance(body)
        if number != self.number:
            raise OtherPlanError(f"{self.number} where rank 0 has {number}")
        if digest != self._digest:
            raise OtherPlanError(
                f"{number} with digest {self._digest.hex()} where rank 0 has {digest.hex()}"
            )
        message: Message = _decode(body)
        return message

    def _advance(self, body: bytes) -> None:
        self.number += 1
        self._digest = hashlib.blake2b(self._digest + body, digest_size=8).digest()
