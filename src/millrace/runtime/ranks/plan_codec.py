"""Rank 0's messages to the other ranks as bytes, each with its number and a digest of all so far.

So a rank that missed or misread a message notices before it runs it. How the bytes are sent is not
known here (ranks.py): a message is a first part of fixed size, and the remaining bytes if it is
longer.
"""

from __future__ import annotations

import hashlib
import struct

import msgspec

from millrace.protocol import ToRank


class MeasureAllReduce(msgspec.Struct, frozen=True, tag="measure"):
    """Take part in measuring the all-reduce of messages with so many rows."""

    rows: list[int]


class FinishedFiles(msgspec.Struct, frozen=True, tag="files"):
    """Take part in finding out which transfers of files have ended on all ranks."""


class CommonRecords(msgspec.Struct, frozen=True, tag="records"):
    """Take part in finding out which of rank 0's records in files, by key, all ranks have."""

    keys: list[str]


Message = ToRank | MeasureAllReduce | FinishedFiles | CommonRecords
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode

FIRST_BYTES = 2048  # size of the first part
# The first part begins with the message's length, its number and the digest.
_HEADER = struct.Struct("<IQ8s")


class PlanMismatchError(Exception):
    """A message is not the one that rank 0 sent; the text says how they differ."""


class PlanCodec:
    """Encodes or decodes a series of messages. number: messages so far."""

    def __init__(self) -> None:
        self.number = 0
        self._digest = bytes(8)

    def pack(self, message: Message) -> bytearray:
        """Encode the next message: its first part, and the remaining bytes behind it."""
        body = _encode(message)
        self._advance(body)
        return bytearray(_HEADER.pack(len(body), self.number, self._digest) + body)

    @staticmethod
    def remaining_bytes(first: bytes) -> int:
        """How many bytes follow the first part."""
        length: int = _HEADER.unpack_from(first)[0]
        return max(0, length - (FIRST_BYTES - _HEADER.size))

    def unpack(self, data: bytes) -> Message:
        """Decode the next message from all of its bytes. Raises PlanMismatchError."""
        length, number, digest = _HEADER.unpack_from(data)
        body = data[_HEADER.size :][:length]
        self._advance(body)
        if number != self.number:
            raise PlanMismatchError(f"{self.number} where rank 0 has {number}")
        if digest != self._digest:
            raise PlanMismatchError(
                f"{number} with digest {self._digest.hex()} where rank 0 has {digest.hex()}"
            )
        message: Message = _decode(body)
        return message

    def _advance(self, body: bytes) -> None:
        self.number += 1
        self._digest = hashlib.blake2b(self._digest + body, digest_size=8).digest()
