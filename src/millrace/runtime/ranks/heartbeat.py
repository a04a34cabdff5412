"""Which ranks are alive: a TCP connection of each to rank 0, watched by a thread on both ends.

Ranks that have met (`rendezvous.py`) each say twice a second which step they have begun. A rank
that dies, stops, falls behind or gives up is named in one line that every other rank gets; what
then ends is the owners' business (`on_failure`). Knows no tensor and no plan.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from millrace.common.framing import Framing, FramingError
from millrace.errors import RankError

BEAT = 0.5  # seconds between signs of life
STOPPED_LIMIT = 5.0  # of silence, for a process that the kernel says is stopped
REMOTE_LIMIT = 15.0  # of silence, for one on another host
SILENT_LIMIT = 30.0  # of silence, for one on this host that is neither stopped nor gone
BEHIND_LIMIT = 60.0  # for which a rank may be some steps behind rank 0 without moving
_LATE = 2.0  # if a beat of ours comes this late, it was us who did not run
_LONGEST = 1 << 20  # bytes of a message


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A rank introduces itself. facts: what must be equal on all ranks, by what it is called."""

    rank: int
    pid: int
    host: str
    token: str
    facts: dict[str, str] = {}


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """A sign of life. step: plans begun so far."""

    step: int


class Fault(msgspec.Struct, frozen=True, tag="fault"):
    """The group has failed, and why."""

    message: str


class Bye(msgspec.Struct, frozen=True, tag="bye"):
    """The sender leaves in order."""


Message = Hello | Beat | Fault | Bye
FRAMING: Framing[Message] = Framing(Message, _LONGEST)
Fate = Callable[[int], str | None]


def no_fate(rank: int) -> str | None:
    """Where ranks were started by somebody else: how one ended is not known."""
    return None


class Peer:
    """The other end of a connection: who it is, and what it last said."""

    def __init__(self, sock: socket.socket, hello: Hello) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.hello = hello
        self.heard = self.moved = time.monotonic()
        self.step = 0
        self.leaving = False
        self._received = bytearray()

    @property
    def name(self) -> str:
        here = self.hello.host == this_host()
        return f"rank {self.hello.rank} (pid {self.hello.pid}" + (
            ")" if here else f" on {self.hello.host.split('/')[0]})"
        )

    def send(self, message: Message) -> None:
        """Send if that needs no waiting; a peer that does not read is noticed by its silence."""
        try:
            self.sock.send(FRAMING.encode(message))
        except OSError:
            return

    def receive(self) -> tuple[list[Message], bool]:
        """(what has arrived, whether the connection still stands). Raises FramingError."""
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return [], True
        except OSError:
            data = b""
        self._received += data
        return list(FRAMING.take(self._received)), bool(data)

    def silence_limit(self) -> float:
        if self.hello.host != this_host():
            return REMOTE_LIMIT
        return STOPPED_LIMIT if is_stopped(self.hello.pid) else SILENT_LIMIT


@dataclass(slots=True)
class _Limit:
    """What a rank does that must be over `seconds` after it began, and what helps if it is not."""

    doing: str
    seconds: float
    advice: str
    began: float


class Heartbeat:
    """This rank's end of the connections: rank 0 has one to each other rank, those one to rank 0.

    on_failure is called once, on the watching thread, with the line that names the rank at fault.
    """

    def __init__(
        self,
        me: Hello,
        peers: list[Peer],
        fate: Fate = no_fate,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self._me = me
        self._peers = peers
        self._fate = fate
        self._on_failure = on_failure
        self._step = 0
        self._limits: tuple[_Limit, ...] = ()  # innermost first
        self._failed = threading.Event()
        self._message = ""
        self._leaving = False
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    # --- called by the rank's own work ------------------------------------------------------

    def check(self) -> None:
        """Raise RankError if the group has failed."""
        if self._failed.is_set():
            raise RankError(self._message)

    @property
    def failed(self) -> bool:
        """Whether the group has failed."""
        return self._failed.is_set()

    def begin(self, step: int) -> None:
        """Note that this rank has begun its plan number `step`."""
        self._step = step

    @contextmanager
    def limited(self, doing: str, seconds: float, advice: str = "") -> Iterator[None]:
        """Have the group fail, this rank named, if what is within takes longer than that.

        Limits may stand within each other, on one thread: each holds for itself.
        """
        around = self._limits
        self._limits = (_Limit(doing, seconds, advice, time.monotonic()), *around)
        try:
            yield
        finally:
            self._limits = around

    def explain(self, error: BaseException, limit: float = 5.0) -> RankError:
        """What a collective's failure comes from: waits for the watch to find out who it was."""
        if self._failed.wait(limit):
            return RankError(self._message)
        first = str(error).strip().splitlines()
        return RankError(f"rank {self._me.rank}: {first[0] if first else type(error).__name__}")

    def fail(self, message: str) -> None:
        """Tell all ranks that the group cannot go on; does not raise."""
        self._fail(message, tell_owner=False)

    def leave(self) -> None:
        """Part in order. Nothing is watched afterwards."""
        self._leaving = True
        for peer in self._peers:
            peer.send(Bye())
        self._wake.send(b"x")
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * BEAT + 1.0)
        for peer in self._peers:
            peer.sock.close()

    # --- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer.sock, selectors.EVENT_READ, peer)
            selector.register(self._woken, selectors.EVENT_READ)
            last = time.monotonic()
            while not (self._leaving or self._failed.is_set()):
                due = last + BEAT - time.monotonic()
                for key, _ in selector.select(max(0.0, due)):
                    if isinstance(key.data, Peer) and not self._hear(key.data):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now >= last + BEAT:
                    self._tick(now, late=now - last > _LATE)
                    last = now

    def _hear(self, peer: Peer) -> bool:
        """Take in what a peer sent. False once its connection has ended."""
        try:
            messages, stands = peer.receive()
        except FramingError as error:
            self._fail(f"{peer.name} sent what no rank sends: {error}")
            return False
        peer.heard = time.monotonic()
        for message in messages:
            if isinstance(message, Beat):
                if message.step != peer.step:
                    peer.step, peer.moved = message.step, peer.heard
            elif isinstance(message, Fault):
                self._fail(message.message)
            elif isinstance(message, Bye):
                peer.leaving = True
        if not (stands or peer.leaving or self._leaving):
            self._fail(f"{peer.name} {self._end_of(peer)}")
        return stands

    def _end_of(self, peer: Peer) -> str:
        """How a rank ended whose connection is gone. Its exit status may be a moment behind."""
        if self._fate is not no_fate:
            deadline = time.monotonic() + 1.0
            while time.monotonic() < deadline:
                if (fate := self._fate(peer.hello.rank)) is not None:
                    return fate
                time.sleep(0.01)
        return "is gone: its connection has ended"

    def _tick(self, now: float, late: bool) -> None:
        self._check_limits(now, late)
        for peer in self._peers:
            peer.send(Beat(self._step))
            if late:  # this process did not run; the others' words may still lie unread
                peer.heard = peer.moved = now
            silent = now - peer.heard
            if peer.leaving:
                continue
            if silent > STOPPED_LIMIT and silent > peer.silence_limit():
                state = " and is stopped" if is_stopped(peer.hello.pid) else ""
                self._fail(f"{peer.name} has not answered for {silent:.0f} s{state}")
            elif peer.hello.rank and peer.step < self._step and now - peer.moved > BEHIND_LIMIT:
                self._fail(
                    f"{peer.name} has been in step {peer.step} for {now - peer.moved:.0f} s; "
                    f"rank {self._me.rank} is in step {self._step}"
                )
            elif peer.step >= self._step:
                peer.moved = now

    def _check_limits(self, now: float, late: bool) -> None:
        for limit in self._limits:
            if late:
                limit.began = now
            elif (spent := now - limit.began) > limit.seconds:
                me = f"rank {self._me.rank} (pid {self._me.pid})"
                self._fail(f"{me} has been {limit.doing} for {spent:.0f} s{limit.advice}")

    def _fail(self, message: str, tell_owner: bool = True) -> None:
        if self._failed.is_set():
            return
        self._message = message
        self._failed.set()
        for peer in self._peers:
            peer.send(Fault(message))
        if tell_owner and self._on_failure is not None:
            self._on_failure(message)


# --- small things ------------------------------------------------------------------------------


def this_host() -> str:
    """A name for this host and its process numbers: `<host name>/<pid namespace>`."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()}/{namespace}"


def is_stopped(pid: int) -> bool:
    """Whether the kernel has stopped a process of this host (SIGSTOP, or a debugger)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")
