"""Messages on a byte stream: msgpack, each behind its length in four bytes.

For pipes, sockets and files between processes of Millrace. A length is checked before anything of
that size is kept, so that bytes that are no message cost no memory. What the messages mean is
known where their types are.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, Generic, TypeVar

import msgspec

Message = TypeVar("Message")
_LENGTH = struct.Struct("<I")


class FramingError(ValueError):
    """Bytes that are no message, or a message that is too long; the text says which."""


class Framing(Generic[Message]):
    """Encodes and decodes messages of one type.

    kind: the type, or a union of tagged structs. longest: bytes of the longest message.
    """

    def __init__(self, kind: Any, longest: int) -> None:
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(kind)
        self._encode = msgspec.msgpack.Encoder().encode
        self._longest = longest

    def encode(self, message: Message) -> bytes:
        """A message with its length. Raises FramingError if it is too long."""
        body = self._encode(message)
        self._check(len(body))
        return _LENGTH.pack(len(body)) + body

    def take(self, received: bytearray) -> Iterator[Message]:
        """Cut every whole message off the beginning of `received`. Raises FramingError."""
        while len(received) >= _LENGTH.size:
            end = _LENGTH.size + self._length(received)
            if len(received) < end:
                return
            body = bytes(received[_LENGTH.size : end])
            del received[:end]
            yield self._decode(body)

    async def receive(self, reader: asyncio.StreamReader) -> Message:
        """The next message. Raises FramingError; asyncio.IncompleteReadError at the end."""
        length = self._length(await reader.readexactly(_LENGTH.size))
        return self._decode(await reader.readexactly(length))

    def receive_from(self, sock: socket.socket) -> Message:
        """The next message of a blocking socket. Raises FramingError, or OSError."""
        length = self._length(_exactly(sock, _LENGTH.size))
        return self._decode(_exactly(sock, length))

    def read_file(self, file: BinaryIO) -> Iterator[Message]:
        """The messages of a file. Raises FramingError, which names the byte, where it is cut off or
        holds something else."""
        while head := file.read(_LENGTH.size):
            start = file.tell() - len(head)
            if len(head) < _LENGTH.size:
                raise FramingError(f"byte {start}: the file is cut off")
            try:
                length = self._length(head)
                body = file.read(length)
                if len(body) < length:
                    raise FramingError("the file is cut off")
                message = self._decode(body)
            except FramingError as error:
                raise FramingError(f"byte {start}: {error}") from None
            yield message

    def _length(self, head: bytes | bytearray) -> int:
        length: int = _LENGTH.unpack_from(head)[0]
        self._check(length)
        return length

    def _check(self, length: int) -> None:
        if length > self._longest:
            raise FramingError(f"a message of {length} bytes; the longest has {self._longest}")

    def _decode(self, body: bytes) -> Message:
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise FramingError(f"{len(body)} bytes that are no message: {error}") from None


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise ConnectionError("the connection has ended")
        data += part
    return bytes(data)
