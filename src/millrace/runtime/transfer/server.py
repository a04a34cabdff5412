"""Hands records over: other engines connect, and take by name what is offered.

It listens on a TCP port, and on a Unix socket that processes of this user and host find by the
engine's id; there the other side gets this engine's memory to read in place. Each connection has a
thread, of which there are few. Every wait has a limit, so one that falls silent costs no record.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import struct
import threading
import time

from torch import Tensor

from millrace.common.framing import FramingError
from millrace.common.sockets import listen
from millrace.runtime.transfer.layout import Piece, RecordLayout, checksum, count_pages, total
from millrace.runtime.transfer.messages import (
    FRAMING,
    Hello,
    Message,
    Offered,
    Refused,
    Take,
    Taken,
)
from millrace.runtime.transfer.offers import Moved, Offers, Reading
from millrace.runtime.transfer.shared_memory import read_only

logger = logging.getLogger(__name__)

MOST_CONNECTIONS = 64
HELLO_SECONDS = 10.0
IDLE_SECONDS = 120.0  # between two records of a connection
MOVE_SECONDS = 30.0  # of one wait while a record moves, and of one until more of it is computed
STOP_SECONDS = 5.0


def local_address(engine: str, rank: int = 0) -> str:
    """The name of the Unix socket of an engine's rank, which is no file."""
    return f"\0millrace-records-{engine}-{rank}"


class RecordServer:
    """The offers of one engine, for others.

    hello: what this engine says of itself. rank: of it. memory: uint8, where the records lie.
    descriptor: of the file that it is; -1: it is none, so nobody reads it in place.
    """

    def __init__(
        self,
        hello: Hello,
        offers: Offers,
        layout: RecordLayout,
        memory: Tensor,
        descriptor: int,
        host: str,
        port: int,
        rank: int = 0,
    ) -> None:
        self._hello, self._offers, self._layout = hello, offers, layout
        self._memory, self._descriptor = memory, descriptor
        self._on_gpu = memory.is_cuda
        self._listeners = listen(host, port)
        self.port: int = self._listeners[0].getsockname()[1]
        if descriptor >= 0 or self._on_gpu:
            self._listeners.append(_listen_locally(hello.engine, rank))
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._wake, self._closing = socket.socketpair()
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, name="records", daemon=True)
        self._accepting.start()

    def set_hello(self, hello: Hello) -> None:
        """What this engine says of itself from now on."""
        self._hello = hello

    def close(self) -> None:
        """End every connection, and wait for their threads, within a limit."""
        self._closing.close()
        self._accepting.join(STOP_SECONDS)
        with self._lock:
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        end = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._wake.close()

    # --- connections --------------------------------------------------------------------------

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            for one in [self._wake, *self._listeners]:
                selector.register(one, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._wake in ready:
                    break
                for listener in ready:
                    assert isinstance(listener, socket.socket)
                    with contextlib.suppress(OSError):
                        self._begin(listener.accept()[0])
        for one in self._listeners:
            one.close()

    def _begin(self, connection: socket.socket) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if len(self._threads) >= MOST_CONNECTIONS or not _is_same_user(connection):
            connection.close()
            return
        with self._lock:
            self._open.add(connection)
        thread = threading.Thread(
            target=self._serve, args=(connection,), name="record-connection", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(HELLO_SECONDS)
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            hello = FRAMING.receive_from(connection)
            if not isinstance(hello, Hello):
                raise FramingError("the first message must be Hello")
            if not self._greet(connection, hello):
                return
            in_place = connection.family == socket.AF_UNIX or hello.transport == "nixl"
            while True:
                connection.settimeout(IDLE_SECONDS)
                message = FRAMING.receive_from(connection)
                connection.settimeout(MOVE_SECONDS)
                if isinstance(message, Take):
                    self._hand_over(connection, message, in_place)
        except (OSError, FramingError) as error:
            logger.debug("a connection for records has ended: %s", error)
        except Exception:
            logger.exception("handing records over")
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _greet(self, connection: socket.socket, hello: Hello) -> bool:
        """Answer a Hello. False: the engines are too different."""
        if unlike := self._hello.identity.differences(hello.identity):
            why = "the engines cannot share records: " + "; ".join(unlike)
            logger.warning("%s", why)
            _send(connection, Refused(why))
            return False
        if hello.transport == "nixl" and not self._hello.agent:
            _send(connection, Refused("nixl: not on this side; use --kv-transport tcp"))
            return False
        if self._on_gpu != (hello.transport == "cuda_ipc"):
            here = "the GPU's" if self._on_gpu else "the host's"
            way = "cuda_ipc" if self._on_gpu else "auto"
            _send(connection, Refused(f"records lie in {here} memory; use --kv-transport {way}"))
            return False
        _send(connection, self._hello)
        if connection.family == socket.AF_UNIX and not self._on_gpu:
            descriptor = read_only(self._descriptor)
            try:
                socket.send_fds(connection, [b"m"], [descriptor])
            finally:
                os.close(descriptor)
        return True

    # --- records ------------------------------------------------------------------------------

    def _hand_over(self, connection: socket.socket, take: Take, in_place: bool) -> None:
        try:
            with self._offers.reading(take.name, min(take.seconds, MOVE_SECONDS)) as reading:
                taken, size = self._give(connection, reading, take, in_place)
        except LookupError as error:
            _send(connection, Refused(str(error.args[0])))
            return
        if taken is None:
            return
        if taken.whole:
            moved = Moved(True, bytes=size, pages=take.pages)
            self._offers.taken(take.name, take.taker, take.takers, moved)
        elif taken.final:
            self._offers.end(take.name, Moved(False, "it did not arrive whole"))

    def _give(
        self, connection: socket.socket, reading: Reading, take: Take, in_place: bool
    ) -> tuple[Taken | None, int]:
        """Send a record, part by part as it is computed. Returns what the other side says of it,
        and its bytes. Raises LookupError if the rest of it is not computed."""
        move = reading.move
        here, done, size = count_pages(move.pages), take.skip, 0
        if here - take.skip != take.pages:
            why = f"the record has {here} pages, and {take.skip} + {take.pages} were asked for"
            _send(connection, Refused(why))
            return None, 0
        final = False
        while not final:
            ready = reading.ready(done, MOVE_SECONDS)
            final = ready < 0
            end = here if final else ready
            state_at = move.state_at if final else -1
            pieces = self._layout.pieces(move.pages, state_at, done, end)
            self._give_part(connection, pieces, end - done, final, in_place)
            done, size = end, size + total(pieces)
        answer = FRAMING.receive_from(connection)
        return (answer, size) if isinstance(answer, Taken) else (None, 0)

    def _give_part(
        self,
        connection: socket.socket,
        pieces: list[Piece],
        pages: int,
        final: bool,
        in_place: bool,
    ) -> None:
        places = [(piece.at, piece.bytes) for piece in pieces] if in_place else []
        size = total(pieces)
        _send(connection, Offered(size, checksum(self._memory, pieces), places, pages, final))
        if not in_place:
            self._send_bytes(connection, pieces)

    def _send_bytes(self, connection: socket.socket, pieces: list[Piece]) -> None:
        data = self._memory.numpy().data
        for piece in pieces:
            connection.sendall(data[piece.at : piece.at + piece.bytes])


def _send(connection: socket.socket, message: Message) -> None:
    connection.sendall(FRAMING.encode(message))


def _listen_locally(engine: str, rank: int) -> socket.socket:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    one.bind(local_address(engine, rank))
    one.listen(MOST_CONNECTIONS)
    one.setblocking(False)
    return one


def _is_same_user(connection: socket.socket) -> bool:
    """Whether the other process may read this one's memory; on TCP it reads only what it names."""
    connection.setblocking(True)
    if connection.family != socket.AF_UNIX:
        return True
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    return bool(user == os.getuid())
