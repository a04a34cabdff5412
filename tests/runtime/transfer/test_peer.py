"""Two peers in one process: every byte arrives, what differs is refused, and nothing outlives its
lease."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.protocol import HostPages, RecordMove, RecordSource
from millrace.runtime.transfer.client import aligned
from millrace.runtime.transfer.identity import Identity, Part
from millrace.runtime.transfer.layout import RecordLayout, checksum, total
from millrace.runtime.transfer.messages import FRAMING, Hello, Offered, Take
from millrace.runtime.transfer.offers import Offers
from millrace.runtime.transfer.peer import Peer
from millrace.runtime.transfer.server import local_address
from millrace.runtime.transfer.shared_memory import mapped, new_file

LAYOUT = RecordLayout((96, 40), 70_001)
SIZE = 1 << 18
IDENTITY = Identity(
    batch_invariant=False,
    protocol=1, version="1", model=["weights 1"], overrides="{}", dtype="float32", page_size=16,
    drafter="mtp", ranks=1, record=[Part("layers.0", "state", "float32", ["head"], [4])],
)  # fmt: skip


def memory(seed: int) -> tuple[torch.Tensor, int]:
    descriptor = new_file(SIZE)
    tensor = torch.frombuffer(mapped(descriptor, SIZE), dtype=torch.uint8)
    tensor.copy_(torch.randint(0, 256, (SIZE,), generator=torch.Generator().manual_seed(seed)))
    return tensor, descriptor


class Side:
    """A peer with its memory."""

    def __init__(self, seed: int, kind: str = "auto", **changes: object) -> None:
        self.memory, self.descriptor = memory(seed)
        identity = msgspec.structs.replace(IDENTITY, **changes)
        self.peer = Peer(identity, LAYOUT, self.memory, self.descriptor, kind, "127.0.0.1", 0)

    def source(self, name: str, tokens: int = 5) -> RecordSource:
        address = self.peer.address
        return RecordSource(address.host, address.port, address.engine, name, tokens)


@contextmanager
def sides(kind: str = "auto", **changes: object) -> Iterator[tuple[Side, Side]]:
    one, other = Side(1, "nixl" if kind == "nixl" else "auto"), Side(2, kind, **changes)
    try:
        yield one, other
    finally:
        other.peer.close()
        one.peer.close()


# Seven pages in two ranges, the first of which has another record's page behind them.
OFFERED = [HostPages(256, 5, 0, 4), HostPages(4096, 3, 0, 3)]
HERE = [HostPages(512, 5, 0, 5)]


def offer(name: str = "a", seconds: float = 30.0) -> RecordMove:
    return RecordMove(name, 0, OFFERED, 65536, seconds)


def wanted(side: Side, name: str = "a", seconds: float = 20.0) -> RecordMove:
    return RecordMove(name, 2, HERE, 131072, seconds, side.source(name))


def assert_equal(one: Side, other: Side) -> int:
    """The record but for its first two pages. Returns its bytes."""
    there = LAYOUT.pieces(OFFERED, 65536, skip=2)
    here = LAYOUT.pieces(HERE, 131072)
    assert total(there) == total(here) == 5 * (96 + 40) + 70_001
    spans = (
        [(piece.at, piece.bytes) for piece in there],
        [(piece.at, piece.bytes) for piece in here],
    )
    for source, target, size in aligned(*spans):
        assert torch.equal(one.memory[source : source + size], other.memory[target : target + size])
    return total(here)


@pytest.mark.parametrize("kind", ["shm", "tcp", "nixl"])
def test_a_record_arrives_and_both_sides_count_its_bytes(kind: str) -> None:
    with sides(kind) as (one, other):
        for name in "ab":  # the second over the same connection
            other.memory.zero_()
            sent = one.peer.send(offer(name))
            came = other.peer.receive(wanted(one, name)).result(20)
            assert came.succeeded, came.error
            assert came.bytes == sent.result(20).bytes == assert_equal(one, other)


def test_nixl_on_one_side_only_is_refused_and_said() -> None:
    one, other = Side(1), Side(2, "nixl")
    one.peer.send(offer())
    assert "use --kv-transport tcp" in other.peer.receive(wanted(one)).result(20).error
    other.peer.close()
    one.peer.close()


def test_numbers_of_ranks_that_do_not_divide_are_refused() -> None:
    two, three = (msgspec.structs.replace(IDENTITY, ranks=n) for n in (2, 3))
    assert two.differences(three) == ["ranks: 3 there, 2 here; one number must divide the other"]
    assert not two.differences(IDENTITY)


def test_a_record_may_be_asked_for_before_it_is_offered() -> None:
    with sides() as (one, other):
        came = other.peer.receive(wanted(one))
        one.peer.send(offer())
        assert came.result(20).succeeded


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"page_size": 32}, "page_size: 16 there, 32 here"),
        ({"drafter": "none"}, "drafter: mtp there, none here"),
        ({"model": ["weights 2"]}, "model: weights 1 there, weights 2 here"),
        ({"version": "2"}, "version: 1 there, 2 here"),
        (
            {"record": [Part("layers.0", "state", "bfloat16", ["head"], [4])]},
            "layers.0 state float32 [4 head] there, layers.0 state bfloat16 [4 head] here",
        ),
    ],
)
def test_unlike_engines_are_refused_with_both_values(changes: dict[str, object], text: str) -> None:
    with sides("tcp", **changes) as (one, other):
        one.peer.send(offer())
        error = other.peer.receive(wanted(one)).result(20).error
        # The side that offers says it, from its own point of view.
        there, here = text.replace(" there", "").removesuffix(" here").split(", ", 1)
        assert "cannot share records" in error
        for value in (there.split(": ")[-1], here):
            assert value in error


def test_another_engine_at_the_same_port_is_not_taken_for_the_first() -> None:
    with sides("tcp") as (one, other):
        move = wanted(one)
        assert move.source is not None
        gone = msgspec.structs.replace(move.source, engine="before")
        error = other.peer.receive(msgspec.structs.replace(move, source=gone)).result(20).error
        assert "not before; it was restarted" in error


def test_nobody_there_is_an_error_at_once() -> None:
    with sides("tcp") as (one, other):
        move = wanted(one)
        one.peer.close()
        came = other.peer.receive(move).result(20)
        assert not came.succeeded
        assert "refused" in came.error


def test_a_record_that_is_refused_says_why() -> None:
    with sides() as (one, other):
        one.peer.send(msgspec.structs.replace(offer(), refused="no room"))
        assert other.peer.receive(wanted(one)).result(20).error.endswith("no room")


def test_bytes_that_changed_on_the_way_are_noticed() -> None:
    """A server that sends a wrong byte."""
    layout, (data, _) = LAYOUT, memory(3)
    pieces = layout.pieces(HERE, 131072)
    listener = socket.create_server(("127.0.0.1", 0))
    with sides("tcp") as (one, other):
        source = RecordSource("127.0.0.1", listener.getsockname()[1], "x", "a", 5)
        came = other.peer.receive(msgspec.structs.replace(wanted(one), source=source))
        connection, _ = listener.accept()
        FRAMING.receive_from(connection)
        connection.sendall(FRAMING.encode(Hello("x", IDENTITY)))
        assert isinstance(FRAMING.receive_from(connection), Take)
        connection.sendall(
            FRAMING.encode(Offered(total(pieces), checksum(data, pieces), [], 5, True))
        )
        data[pieces[-1].at + 7] ^= 1
        for piece in pieces:
            connection.sendall(data[piece.at : piece.at + piece.bytes].numpy().data)
        assert "checksum" in came.result(20).error
        connection.close()
    listener.close()


@pytest.mark.parametrize("stage", ["hello", "take", "bytes"])
def test_an_engine_that_dies_on_the_way_fails_the_record(stage: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with sides("tcp") as (one, other):
        source = RecordSource("127.0.0.1", listener.getsockname()[1], "x", "a", 5)
        came = other.peer.receive(msgspec.structs.replace(wanted(one), source=source))
        listener.settimeout(20)
        for _ in range(2):  # it tries once more over a new connection
            connection, _ = listener.accept()
            if stage != "hello":
                FRAMING.receive_from(connection)
                connection.sendall(FRAMING.encode(Hello("x", IDENTITY)))
                FRAMING.receive_from(connection)
            if stage == "bytes":
                connection.sendall(
                    FRAMING.encode(Offered(5 * 136 + 70_001, b"", [], 5, True)) + b"x" * 50
                )
            connection.close()
            if stage == "hello":
                break
        assert not came.result(20).succeeded
    listener.close()


def test_an_engine_that_falls_silent_costs_its_time_limit() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with sides("tcp") as (one, other):
        source = RecordSource("127.0.0.1", listener.getsockname()[1], "x", "a", 5)
        move = msgspec.structs.replace(wanted(one, seconds=0.2), source=source)
        assert "no answer" in other.peer.receive(move).result(20).error
    listener.close()


def test_a_taker_that_dies_leaves_the_record_for_the_next() -> None:
    with sides("tcp") as (one, other):
        sent = one.peer.send(offer())
        sock = socket.create_connection((one.peer.address.host, one.peer.address.port))
        sock.sendall(FRAMING.encode(Hello("y", IDENTITY)))
        FRAMING.receive_from(sock)
        sock.sendall(FRAMING.encode(Take("a", 2, 5, 10.0)))
        FRAMING.receive_from(sock)
        sock.close()
        assert not sent.done()
        assert other.peer.receive(wanted(one)).result(20).succeeded
        assert sent.result(20).succeeded


def test_bytes_that_are_no_message_end_the_connection_alone() -> None:
    with sides("tcp") as (one, other):
        sock = socket.create_connection((one.peer.address.host, one.peer.address.port))
        sock.settimeout(20)
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        sock.close()
        one.peer.send(offer())
        assert other.peer.receive(wanted(one)).result(20).succeeded


def test_a_wrong_number_of_pages_is_refused() -> None:
    with sides("tcp") as (one, other):
        one.peer.send(offer())
        few = msgspec.structs.replace(wanted(one), pages=[HostPages(512, 4, 0, 4)])
        assert "the record has 7 pages" in other.peer.receive(few).result(20).error


def test_a_lease_ends_unless_somebody_reads() -> None:
    now = 0.0
    offers = Offers(now=lambda: now)
    ended = offers.add(offer(seconds=30.0))
    with offers.reading("a", 0.0):
        now = 31.0
        offers.expire()
        assert not ended.done()
    assert ended.result(0) == (False, "its lease has ended", 0, 0.0, 0)
    assert len(offers) == 0
    with pytest.raises(LookupError, match="no such record"), offers.reading("a", 0.0):
        pass


def test_nothing_is_left_after_the_end() -> None:
    """Neither sockets nor threads."""
    with sides() as (one, other):
        one.peer.send(offer())
        assert other.peer.receive(wanted(one)).result(20).succeeded
        name = local_address(one.peer.address.engine)
        unfinished = one.peer.send(offer("b"))
    assert unfinished.result(0).error == "the engine ends"
    assert not [thread for thread in threading.enumerate() if "record" in thread.name]
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(name)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_cut_of_a_record_has_the_same_bytes_and_checksum(data: st.DataObject) -> None:
    """However the pages of a record are spread over ranges, on either side."""
    sizes = tuple(data.draw(st.lists(st.sampled_from([8, 24, 40, 13]), min_size=1, max_size=3)))
    layout = RecordLayout(sizes, data.draw(st.sampled_from([0, 8, 65_536, 65_541])))
    count = data.draw(st.integers(0, 12))
    record = torch.randint(0, 256, (count * sum(sizes) + layout.state_bytes,), dtype=torch.uint8)
    sums, contents = set(), set()
    for _ in range(2):
        area = torch.zeros(len(record) + 60 * sum(sizes) + 1024, dtype=torch.uint8)
        pages, at, left = [], 0, count
        while left:
            room = data.draw(st.integers(1, left))
            begin, behind = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
            pages.append(HostPages(at, begin + room + behind, begin, begin + room))
            at += (begin + room + behind) * sum(sizes) + -((begin + room + behind) * sum(sizes)) % 8
            left -= room
        pieces = layout.pieces(pages, at if layout.state_bytes else -1)
        first = 0
        for piece in pieces:
            area[piece.at : piece.at + piece.bytes] = record[first : first + piece.bytes]
            first += piece.bytes
        sums.add(checksum(area, pieces))
        contents.add(b"".join(bytes(area[p.at : p.at + p.bytes].tolist()) for p in pieces))
    assert len(sums) == len(contents) == 1
    assert contents == {bytes(record.tolist())}


# --- records that grow --------------------------------------------------------------------------


def grown(ready: int, name: str = "a", **changes: object) -> RecordMove:
    return msgspec.structs.replace(offer(name), ready=ready, **changes)


@pytest.mark.parametrize("kind", ["shm", "tcp", "nixl"])
@pytest.mark.parametrize("steps", [(0, 3, 6), (2, 4), (5,), (1, 1, 7)])
def test_a_record_comes_while_it_grows(kind: str, steps: tuple[int, ...]) -> None:
    """Pages behind those that are ready are garbage until they are; each comes once."""
    with sides(kind) as (one, other):
        whole = one.memory.clone()
        pieces = LAYOUT.pieces(OFFERED, 65536)
        for piece in pieces:
            one.memory[piece.at : piece.at + piece.bytes] = 0
        came = other.peer.receive(wanted(one))
        for number, ready in enumerate((*steps, -1)):
            final = LAYOUT.pieces(OFFERED, 65536 if ready < 0 else -1, end=ready % 8)
            for piece in final:
                span = slice(piece.at, piece.at + piece.bytes)
                one.memory[span] = whole[span]
            if number == 0:
                sent = one.peer.send(grown(ready))
            else:
                one.peer.grow(grown(ready))
            assert ready < 0 or not sent.done()
        found = came.result(20)
        assert found.succeeded, found.error
        assert found.bytes == sent.result(20).bytes == assert_equal(one, other)
        assert torch.equal(one.memory, whole)


@pytest.mark.parametrize("kind", ["shm", "tcp"])
@pytest.mark.parametrize("ready", [0, 4])
def test_a_record_that_stops_growing_is_no_record(kind: str, ready: int) -> None:
    """Given up by its engine, or its engine ends: both sides know, and nothing is left."""
    for ends in (False, True):
        with sides(kind) as (one, other):
            sent = one.peer.send(grown(ready))
            came = other.peer.receive(wanted(one))
            one.peer.grow(grown(max(ready, 3)))
            if ends:
                one.peer.close()
            else:
                one.peer.grow(msgspec.structs.replace(offer(), refused="its request has ended"))
                assert came.result(20).error.endswith("its request has ended")
            assert not came.result(20).succeeded
            assert not sent.result(20).succeeded


def test_a_taker_that_dies_while_a_record_grows_leaves_it_for_the_next() -> None:
    with sides("tcp") as (one, other):
        sent = one.peer.send(grown(4))
        sock = socket.create_connection((one.peer.address.host, one.peer.address.port))
        sock.sendall(FRAMING.encode(Hello("y", IDENTITY)))
        FRAMING.receive_from(sock)
        sock.sendall(FRAMING.encode(Take("a", 2, 5, 10.0)))
        assert not getattr(FRAMING.receive_from(sock), "final", True)
        sock.close()
        one.peer.grow(grown(-1))
        assert other.peer.receive(wanted(one)).result(20).succeeded
        assert sent.result(20).bytes == assert_equal(one, other)


def test_a_growing_record_has_no_lease_until_it_is_whole() -> None:
    now = 0.0
    offers = Offers(now=lambda: now)
    ended = offers.add(grown(2))
    now = 100.0
    offers.expire()
    assert not ended.done()
    offers.grow(grown(-1))
    now = 129.0
    offers.expire()
    assert not ended.done()
    now = 131.0
    offers.expire()
    assert ended.result(0).error == "its lease has ended"
    offers.grow(grown(-1))  # nobody can take it any more
    assert len(offers) == 0
