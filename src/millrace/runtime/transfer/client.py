"""Takes records from other engines into the host's memory, and checks that they came whole.

A connection to an engine is kept and used again. The first message of one makes sure that both
engines are alike. Where they run on one host, the record is copied out of the other's memory; else
it comes over TCP, or NIXL reads it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.common.framing import FramingError
from millrace.protocol import HostPages, RecordMove, RecordSource
from millrace.runtime.transfer.device_memory import close_handle, open_handle
from millrace.runtime.transfer.device_wait import comes_within
from millrace.runtime.transfer.layout import Piece, RecordLayout, checksum, count_pages, total
from millrace.runtime.transfer.messages import (
    FRAMING,
    Hello,
    Message,
    Offered,
    Refused,
    Take,
    Taken,
    Transport,
)
from millrace.runtime.transfer.nixl import NixlReader
from millrace.runtime.transfer.offers import Moved
from millrace.runtime.transfer.record_form import RecordForm, sources_of
from millrace.runtime.transfer.server import local_address
from millrace.runtime.transfer.shared_memory import mapped_read_only

CONNECT_SECONDS = 5.0
DEVICE_SECONDS = 60  # for copies on the device; they take milliseconds
AT_ONCE = 16  # records; most of them wait for their prompts
OFFER_SECONDS = 10.0  # a record may be asked for before it is in the host's memory
MOST_KEPT = 4  # connections to one rank of an engine
MOST_ENGINES = 64  # that are remembered
STOP_SECONDS = 5.0
KINDS = ("auto", "shm", "tcp", "nixl", "cuda_ipc")


class RecordError(Exception):
    """A record cannot be had; the text says why."""


@dataclass(frozen=True, slots=True)
class _Rank:
    """Who hands over: one rank of an engine."""

    host: str
    port: int
    engine: str
    rank: int = 0


@dataclass(frozen=True, slots=True)
class _Target:
    """Where the bytes of a record go, in order. layout, pages, state_at: of them in the memory;
    taker: as in `Take`, with the number of them."""

    memory: Tensor
    layout: RecordLayout
    pages: list[HostPages]
    state_at: int
    taker: tuple[int, int] = (0, 1)

    def pieces(self, first: int, end: int, final: bool) -> list[Piece]:
        """Of some pages; final: and of the state."""
        return self.layout.pieces(self.pages, self.state_at if final else -1, first, end)


class _Connection:
    """An open connection. memory: the other's, where it is on this host."""

    def __init__(self, sock: socket.socket, hello: Hello, memory: Tensor | None) -> None:
        self.socket, self.hello, self.memory = sock, hello, memory

    def ask(self, message: Message) -> Message:
        self.socket.sendall(FRAMING.encode(message))
        return FRAMING.receive_from(self.socket)


class RecordClient:
    """Of one rank of an engine.

    hello: what the engine says of itself. memory: uint8, where records come to. kind: how their
    bytes come; auto: out of the other's memory where that is possible. reader: of NIXL. form: how
    records are divided over ranks; None: only engines with as many are asked.
    """

    def __init__(
        self,
        hello: Hello,
        layout: RecordLayout,
        memory: Tensor,
        kind: str = "auto",
        reader: NixlReader | None = None,
        rank: int = 0,
        form: RecordForm | None = None,
    ) -> None:
        self._hello, self._layout, self._memory = hello, layout, memory
        self._kind, self._reader = kind, reader
        self._rank, self._ranks, self._form = rank, hello.identity.ranks, form
        self._engines: dict[str, Hello] = {}  # what those say that were asked lately
        self._kept: dict[_Rank, list[_Connection]] = {}
        self._in_use: set[socket.socket] = set()
        self._mapped: dict[bytes, Tensor] = {}  # other engines' memory, by its handle
        self._lock = threading.Lock()
        self._closing = False
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="take-records")

    def take(self, move: RecordMove) -> Future[Moved]:
        """Bring a record. The result says whether it is here."""
        return self._threads.submit(self._take_beside, move)

    def close(self) -> None:
        """End what is under way, and every connection."""
        with self._lock:
            self._closing = True
            kept = [one.socket for some in self._kept.values() for one in some]
            for one in [*kept, *self._in_use]:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            for one in kept:
                one.close()
            self._kept.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for memory in self._mapped.values():
            with contextlib.suppress(OSError):  # its engine is gone
                close_handle(memory)
        self._mapped.clear()

    # --- on a thread --------------------------------------------------------------------------

    def _take_beside(self, move: RecordMove) -> Moved:
        """On a stream of its own where the memory is a GPU's, so that no step waits."""
        if not self._memory.is_cuda:
            return self._take(move)
        stream = torch.cuda.Stream(self._memory.device)
        with torch.cuda.stream(stream):
            moved = self._take(move)
        if not comes_within(stream, DEVICE_SECONDS):
            return Moved(False, f"the device has not ended its copies in {DEVICE_SECONDS} s")
        return moved

    def _take(self, move: RecordMove) -> Moved:
        assert move.source is not None
        began = time.monotonic()
        where = f"{move.source.host}:{move.source.port}"
        try:
            size = self._take_all(move.source, move, began + move.seconds)
            pages, seconds = count_pages(move.pages), time.monotonic() - began
            return Moved(True, bytes=size, seconds=seconds, pages=pages)
        except RecordError as error:
            return Moved(False, f"{where}: {error}")
        except TimeoutError:
            return Moved(False, f"{where}: no answer in {time.monotonic() - began:.1f} s")
        except (OSError, FramingError, ValueError) as error:
            return Moved(False, f"{where}: {error}")

    def _take_all(self, source: RecordSource, move: RecordMove, end: float) -> int:
        """The bytes that came, of all ranks of the other engine that have a part of it."""
        hello = self._hello_of(source, end)
        ranks = hello.identity.ranks
        ports = hello.ports or (source.port,)
        if ranks == self._ranks:
            one = _Rank(source.host, ports[self._rank], source.engine, self._rank)
            target = _Target(self._memory, self._layout, move.pages, move.state_at)
            return self._take_from(one, move, target, end)
        assert self._form is not None
        pages = count_pages(move.pages)
        layout = self._form.layout(ranks)
        each = [HostPages(0, pages, 0, pages)] if pages else []
        state_at = pages * sum(layout.page_bytes) if move.state_at >= 0 else -1
        size = total(layout.pieces(each, state_at))
        taker = (self._rank, max(1, self._ranks // ranks))
        parts: dict[int, Tensor] = {}
        for rank in sources_of(self._rank, self._ranks, ranks):
            device = self._memory.device
            parts[rank] = torch.empty(size, dtype=torch.uint8, device=device)
            one = _Rank(source.host, ports[rank], source.engine, rank)
            target = _Target(parts[rank], layout, each, state_at, taker)
            self._take_from(one, move, target, time.monotonic() + move.seconds)
        here = self._layout.pieces(move.pages, move.state_at)
        self._put(self._form, parts, ranks, pages, here)
        return size * len(parts)

    def _put(
        self,
        form: RecordForm,
        parts: Mapping[int, Tensor],
        ranks: int,
        pages: int,
        pieces: list[Piece],
    ) -> None:
        """Cut this rank's record out of those of the other's ranks, and put it into its place."""
        data = form.cut(parts, ranks, self._rank, self._ranks, pages)
        _copy(data, [(0, len(data))], self._memory, pieces)

    def _hello_of(self, source: RecordSource, end: float) -> Hello:
        """What the other engine says of itself, from its rank 0."""
        known = self._engines.get(source.engine)
        if known is None:
            rank = _Rank(source.host, source.port, source.engine)
            connection = self._connection(rank, end, fresh=False)
            self._put_back(rank, connection, keep=True)
            known = connection.hello
            while len(self._engines) >= MOST_ENGINES:
                self._forget(next(iter(self._engines)))
            self._engines[source.engine] = known
        return known

    def _forget(self, engine: str) -> None:
        with self._lock:
            self._engines.pop(engine, None)
            for rank in [one for one in self._kept if one.engine == engine]:
                for connection in self._kept.pop(rank):
                    connection.socket.close()

    def _take_from(self, source: _Rank, move: RecordMove, target: _Target, end: float) -> int:
        """The bytes that came. An old connection may have died unnoticed, so a second try has a new
        one."""
        for fresh in (False, True):
            connection = self._connection(source, end, fresh)
            keep = False
            try:
                answer = self._ask(connection, move, target, end)
                keep = isinstance(answer, Refused)
                size = self._fill(connection, answer, target, move.seconds)
                keep = True
                return size
            except ConnectionError:
                if fresh:
                    raise
            finally:
                self._put_back(source, connection, keep)
        raise AssertionError

    def _ask(
        self, connection: _Connection, move: RecordMove, target: _Target, end: float
    ) -> Message:
        connection.socket.settimeout(_left(end))
        early = move.source is not None and not move.source.tokens
        wait = move.seconds if early else OFFER_SECONDS
        pages = count_pages(move.pages)
        return connection.ask(Take(move.name, move.first, pages, wait, *target.taker))

    def _fill(
        self, connection: _Connection, answer: Message, target: _Target, seconds: float
    ) -> int:
        """Copy what is offered into its place, part by part. seconds: for each of them. Returns the
        bytes. Raises RecordError unless the record came whole."""
        part, done = _offered(answer), 0
        size = self._bring(connection, part, target, done, seconds)
        while not part.final:
            done += part.pages
            connection.socket.settimeout(seconds)
            part = _offered(FRAMING.receive_from(connection.socket))
            size += self._bring(connection, part, target, done, seconds)
        if done + part.pages != count_pages(target.pages):
            raise RecordError("pages of the record are missing")
        connection.socket.sendall(FRAMING.encode(Taken(True)))
        return size

    def _bring(
        self, connection: _Connection, offered: Offered, target: _Target, done: int, seconds: float
    ) -> int:
        """Copy a part into its place, behind so many pages. Returns its bytes. Raises RecordError
        unless it came whole."""
        end, memory = time.monotonic() + seconds, target.memory
        pieces = target.pieces(done, done + offered.pages, offered.final)
        size = total(pieces)
        if offered.size != size:
            raise RecordError(f"{offered.size} bytes are offered, and {size} are needed")
        if connection.memory is not None:
            _copy(connection.memory, offered.places, memory, pieces)
        elif self._reader is not None:
            with self._reader.reading(connection.hello, offered.places, end) as data:
                _copy(data, [(0, size)], memory, pieces)
        else:
            _receive(connection.socket, memory, pieces, end)
        if checksum(memory, pieces) != offered.checksum:
            connection.socket.sendall(FRAMING.encode(Taken(False)))
            raise RecordError("the record's checksum is wrong")
        return size

    # --- connections --------------------------------------------------------------------------

    def _connection(self, source: _Rank, end: float, fresh: bool) -> _Connection:
        with self._lock:
            if fresh:  # those that are kept may have died, too
                for one in self._kept.pop(source, []):
                    one.socket.close()
            kept = self._kept.get(source)
            found = kept.pop() if kept else None
        found = found or self._connect(source, end)
        with self._lock:
            self._in_use.add(found.socket)
            if self._closing:
                found.socket.close()
        return found

    def _connect(self, source: _Rank, end: float) -> _Connection:
        on_host: Transport = "cuda_ipc" if self._kind == "cuda_ipc" else "shm"
        if self._kind in ("auto", on_host) and (local := _connect_locally(source)):
            return self._greet(local, source, on_host, end)
        if self._kind == on_host:
            raise RecordError("the other engine's memory is not on this host; use --kv-transport")
        limit = min(CONNECT_SECONDS, _left(end))
        sock = socket.create_connection((source.host, source.port), limit)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._greet(sock, source, "nixl" if self._kind == "nixl" else "tcp", end)

    def _greet(
        self, sock: socket.socket, source: _Rank, transport: Transport, end: float
    ) -> _Connection:
        """Make sure that both engines are alike. Raises RecordError."""
        try:
            sock.settimeout(min(CONNECT_SECONDS, _left(end)))
            agent = self._reader.agent if self._reader else b""
            hello = Hello(self._hello.engine, self._hello.identity, transport, agent=agent)
            sock.sendall(FRAMING.encode(hello))
            answer = FRAMING.receive_from(sock)
            if isinstance(answer, Refused):
                raise RecordError(answer.why)
            if not isinstance(answer, Hello):
                raise RecordError("an answer that is none")
            if answer.engine != source.engine:
                raise RecordError(
                    f"engine {answer.engine} is there now, not {source.engine}; it was restarted"
                )
            if unlike := self._hello.identity.differences(answer.identity):
                raise RecordError("the engines cannot share records: " + "; ".join(unlike))
            memory = None
            if transport == "shm":
                memory = _memory_of(sock, answer)
            elif transport == "cuda_ipc":
                memory = self._opened(answer)
            return _Connection(sock, answer, memory)
        except BaseException:
            sock.close()
            raise

    def _opened(self, hello: Hello) -> Tensor:
        """The memory of another engine, on a GPU. It is opened once for all connections."""
        with self._lock:
            known = self._mapped.get(hello.handle)
            if known is None:
                while len(self._mapped) >= MOST_ENGINES:
                    close_handle(self._mapped.pop(next(iter(self._mapped))))
                known = open_handle(hello.handle, hello.memory, self._memory.device)
                self._mapped[hello.handle] = known
            return known

    def _put_back(self, source: _Rank, connection: _Connection, keep: bool) -> None:
        """Keep a connection for the next record, or close it."""
        with self._lock:
            self._in_use.discard(connection.socket)
            kept = self._kept.setdefault(source, [])
            if keep and len(kept) < MOST_KEPT and not self._closing:
                kept.append(connection)
            else:
                connection.socket.close()


def _offered(answer: Message) -> Offered:
    """Raises RecordError if nothing is offered."""
    if isinstance(answer, Refused):
        raise RecordError(answer.why)
    if not isinstance(answer, Offered):
        raise RecordError("an answer that is none")
    return answer


def _connect_locally(source: _Rank) -> socket.socket | None:
    """None: it is not on this host."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(CONNECT_SECONDS)
    try:
        sock.connect(local_address(source.engine, source.rank))
    except OSError:
        sock.close()
        return None
    return sock


def _receive(sock: socket.socket, memory: Tensor, pieces: list[Piece], end: float) -> None:
    data = memory.numpy().data
    for piece in pieces:
        place, at = data[piece.at : piece.at + piece.bytes], 0
        while at < piece.bytes:
            sock.settimeout(_left(end))
            count = sock.recv_into(place[at:])
            if not count:
                raise ConnectionError("the other engine ended the connection")
            at += count


def _memory_of(sock: socket.socket, hello: Hello) -> Tensor:
    _, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
    if not descriptors:
        raise RecordError("the other engine did not send its memory")
    try:
        return mapped_read_only(descriptors[0], hello.memory)
    finally:
        for one in descriptors:
            os.close(one)


def _copy(there: Tensor, places: list[tuple[int, int]], here: Tensor, pieces: list[Piece]) -> None:
    """Copy bytes at places of one memory, in order, into pieces of another of as many bytes."""
    spans = [(piece.at, piece.bytes) for piece in pieces]
    for source, target, size in aligned(places, spans):
        if source + size > len(there):
            raise RecordError("the record lies outside of the other engine's memory")
        here[target : target + size].copy_(there[source : source + size])


def aligned(
    sources: list[tuple[int, int]], targets: list[tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """(from, to, bytes) of copies that bring the bytes of some spans (at, bytes), in order, into
    others. Raises RecordError if these are more or fewer."""
    if sum(size for _, size in sources) != sum(size for _, size in targets):
        raise RecordError("the record has another size than its places")
    left = [list(span) for span in targets]
    for at, size in sources:
        while size:
            count = min(size, left[0][1])
            if count:
                yield at, left[0][0], count
            at, size = at + count, size - count
            left[0][0] += count
            left[0][1] -= count
            if not left[0][1]:
                left.pop(0)


def _left(end: float) -> float:
    """Seconds until `end`. Raises TimeoutError if there are none."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
