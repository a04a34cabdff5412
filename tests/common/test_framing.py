"""Messages come out as they went in, however the bytes are cut; other bytes are a clear error."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.common.framing import Framing, FramingError
from tests.support.running import run


class Word(msgspec.Struct, frozen=True, tag="word"):
    text: str


class Count(msgspec.Struct, frozen=True, tag="count"):
    number: int


FRAMING: Framing[Word | Count] = Framing(Word | Count, longest=1000)
MESSAGES = [Word("a"), Count(5), Word(""), Word("x" * 500)]
BYTES = b"".join(map(FRAMING.encode, MESSAGES))


@given(cuts=st.lists(st.integers(0, len(BYTES)), max_size=8))
def test_messages_come_out_however_the_bytes_are_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(BYTES)]
    received, messages = bytearray(), []
    for start, end in pairwise(edges):
        received += BYTES[start:end]
        messages += FRAMING.take(received)
    assert messages == MESSAGES
    assert received == b""


def test_a_stream_of_messages() -> None:
    async def scenario() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(BYTES + b"\x05\x00")
        reader.feed_eof()
        assert [await FRAMING.receive(reader) for _ in MESSAGES] == MESSAGES
        with pytest.raises(asyncio.IncompleteReadError):
            await FRAMING.receive(reader)

    run(scenario())


def test_a_socket_of_messages() -> None:
    here, there = socket.socketpair()
    with here:
        sender = threading.Thread(target=there.sendall, args=[BYTES + b"\x01"])
        sender.start()
        here.settimeout(10)
        assert [FRAMING.receive_from(here) for _ in MESSAGES] == MESSAGES
        sender.join(10)
        there.close()
        with pytest.raises(ConnectionError):
            FRAMING.receive_from(here)


def test_a_file_of_messages() -> None:
    assert list(FRAMING.read_file(io.BytesIO(BYTES))) == MESSAGES
    assert list(FRAMING.read_file(io.BytesIO())) == []
    first = len(FRAMING.encode(MESSAGES[0]))
    for end in range(first + 1, first + len(FRAMING.encode(MESSAGES[1]))):
        with pytest.raises(FramingError, match=f"byte {first}: the file is cut off"):
            list(FRAMING.read_file(io.BytesIO(BYTES[:end])))


def test_a_message_that_is_too_long_is_refused_on_both_sides() -> None:
    with pytest.raises(FramingError, match=r"a message of 10.. bytes; the longest has 1000"):
        FRAMING.encode(Word("x" * 1000))
    head = b"\xe9\x03\x00\x00"  # 1001
    with pytest.raises(FramingError, match="a message of 1001 bytes; the longest has 1000"):
        list(FRAMING.take(bytearray(head)))
    with pytest.raises(FramingError, match="byte 0: a message of 1001 bytes"):
        list(FRAMING.read_file(io.BytesIO(head)))
    here, there = socket.socketpair()
    with here, there:
        there.sendall(head)
        with pytest.raises(FramingError, match="a message of 1001 bytes"):
            FRAMING.receive_from(here)


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\x93", msgspec.msgpack.encode({"type": "other"}), b"\xa1\xff"]
)
def test_bytes_that_are_no_message_are_named(body: bytes) -> None:
    data = len(body).to_bytes(4, "little") + body
    with pytest.raises(FramingError, match=f"^{len(body)} bytes that are no message: "):
        list(FRAMING.take(bytearray(data)))
    with pytest.raises(FramingError, match=r"^byte 0: "):
        list(FRAMING.read_file(io.BytesIO(data)))
