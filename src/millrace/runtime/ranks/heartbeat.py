"""Which ranks are alive: a TCP connection of each to rank 0, watched by a thread on both ends.

After the rendezvous (`rendezvous.py`) each rank sends, twice a second, the number of the step that
it has begun. If a rank dies, stops, falls behind or gives up, one line that names it reaches every
other rank. What those then end is decided by their owner (`on_failure`). This module knows neither
tensors nor plans.
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

BEAT = 0.5  # seconds between two heartbeats
STOPPED_LIMIT = 5.0  # seconds of silence, if the kernel says that the process is stopped
REMOTE_LIMIT = 15.0  # seconds of silence, for a rank on another host
SILENT_LIMIT = 30.0  # seconds of silence, for a rank on this host that runs
BEHIND_LIMIT = 60.0  # seconds without progress, for a rank that is behind rank 0
LATE_SECONDS = 2.0  # a beat of ours this late means that this process did not run
MAX_FRAME = 1 << 20  # bytes of a message


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A rank introduces itself. facts: name -> value of what must be equal on all ranks."""

    rank: int
    pid: int
    host: str
    token: str
    facts: dict[str, str] = {}


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """A heartbeat. step: the number of plans begun so far."""

    step: int


class Fault(msgspec.Struct, frozen=True, tag="fault"):
    """The group has failed; message: why."""

    message: str


class Bye(msgspec.Struct, frozen=True, tag="bye"):
    """The sender leaves the group normally."""


Message = Hello | Beat | Fault | Bye
FRAMING: Framing[Message] = Framing(Message, MAX_FRAME)
ExitReason = Callable[[int], str | None]


def unknown_exit(rank: int) -> str | None:
    """For ranks that another program started: how one ended is not known."""
    return None


class Peer:
    """The rank at the other end of a connection, and when it was last heard and made progress."""

    def __init__(self, sock: socket.socket, hello: Hello) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.hello = hello
        self.last_heard = self.last_progress = time.monotonic()
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
        """Send without waiting. A peer that does not read is noticed by its silence."""
        try:
            self.sock.send(FRAMING.encode(message))
        except OSError:
            return

    def receive(self) -> tuple[list[Message], bool]:
        """(the messages that have arrived, whether the connection is open). Raises FramingError."""
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
class _TimeLimit:
    """A time limit for what a rank does. advice: what helps if the limit is reached."""

    doing: str
    seconds: float
    advice: str
    began: float


class Heartbeat:
    """This rank's heartbeat connections: rank 0 has one to each rank, the others one to rank 0.

    on_failure is called once, on the heartbeat thread, with the line that names the rank at fault.
    """

    def __init__(
        self,
        me: Hello,
        peers: list[Peer],
        exit_reason: ExitReason = unknown_exit,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self._me = me
        self.peers = peers
        self._exit_reason = exit_reason
        self._on_failure = on_failure
        self._step = 0
        self._limits: tuple[_TimeLimit, ...] = ()  # innermost first
        self._failed = threading.Event()
        self._message = ""
        self._leaving = False
        self._wake, self._wake_reader = socket.socketpair()
        self.thread = threading.Thread(target=self._run, name="rank-heartbeat", daemon=True)
        self.thread.start()

    # --- called on the rank's main thread -----------------------------------------------------

    def check(self) -> None:
        """Raise RankError if the group has failed."""
        if self._failed.is_set():
            raise RankError(self._message)

    @property
    def failed(self) -> bool:
        """Whether the group has failed."""
        return self._failed.is_set()

    def begin(self, step: int) -> None:
        """This rank has begun plan number `step`."""
        self._step = step

    @contextmanager
    def limited(self, doing: str, seconds: float, advice: str = "") -> Iterator[None]:
        """Fail the group, and name this rank, if the `with` block takes longer than `seconds`.

        Blocks may be nested on one thread; each limit counts from its own start.
        """
        around = self._limits
        self._limits = (_TimeLimit(doing, seconds, advice, time.monotonic()), *around)
        try:
            yield
        finally:
            self._limits = around

    def explain(self, error: BaseException, limit: float = 5.0) -> RankError:
        """The cause of a collective's error: waits up to `limit` s until a failed rank is known."""
        if self._failed.wait(limit):
            return RankError(self._message)
        first = str(error).strip().splitlines()
        return RankError(f"rank {self._me.rank}: {first[0] if first else type(error).__name__}")

    def fail(self, message: str) -> None:
        """Fail the group on all ranks, with this message; does not raise."""
        self._fail(message, tell_owner=False)

    def leave(self) -> None:
        """Leave the group normally. Nothing is watched afterwards."""
        self._leaving = True
        for peer in self.peers:
            peer.send(Bye())
        self._wake.send(b"x")
        if threading.current_thread() is not self.thread:
            self.thread.join(2 * BEAT + 1.0)
        for peer in self.peers:
            peer.sock.close()

    # --- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self.peers:
                selector.register(peer.sock, selectors.EVENT_READ, peer)
            selector.register(self._wake_reader, selectors.EVENT_READ)
            last = time.monotonic()
            while not (self._leaving or self._failed.is_set()):
                due = last + BEAT - time.monotonic()
                for key, _ in selector.select(max(0.0, due)):
                    if isinstance(key.data, Peer) and not self._read_peer(key.data):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now >= last + BEAT:
                    self._tick(now, late=now - last > LATE_SECONDS)
                    last = now

    def _read_peer(self, peer: Peer) -> bool:
        """Handle a peer's messages. False once its connection has ended."""
        try:
            messages, connected = peer.receive()
        except FramingError as error:
            self._fail(f"{peer.name} sent what no rank sends: {error}")
            return False
        peer.last_heard = time.monotonic()
        for message in messages:
            if isinstance(message, Beat):
                if message.step != peer.step:
                    peer.step, peer.last_progress = message.step, peer.last_heard
            elif isinstance(message, Fault):
                self._fail(message.message)
            elif isinstance(message, Bye):
                peer.leaving = True
        if not (connected or peer.leaving or self._leaving):
            self._fail(f"{peer.name} {self._exit_reason_of(peer)}")
        return connected

    def _exit_reason_of(self, peer: Peer) -> str:
        """How the rank of a closed connection ended. Its exit status may come a moment later."""
        if self._exit_reason is not unknown_exit:
            deadline = time.monotonic() + 1.0
            while time.monotonic() < deadline:
                if (exit_reason := self._exit_reason(peer.hello.rank)) is not None:
                    return exit_reason
                time.sleep(0.01)
        return "is gone: its connection has ended"

    def _tick(self, now: float, late: bool) -> None:
        self._check_limits(now, late)
        for peer in self.peers:
            peer.send(Beat(self._step))
            if late:  # this process did not run; messages of others may be unread
                peer.last_heard = peer.last_progress = now
            silent = now - peer.last_heard
            if peer.leaving:
                continue
            if silent > STOPPED_LIMIT and silent > peer.silence_limit():
                state = " and is stopped" if is_stopped(peer.hello.pid) else ""
                self._fail(f"{peer.name} has not answered for {silent:.0f} s{state}")
            elif (
                peer.hello.rank
                and peer.step < self._step
                and now - peer.last_progress > BEHIND_LIMIT
            ):
                self._fail_behind(peer, now)
            elif peer.step >= self._step:
                peer.last_progress = now

    def _fail_behind(self, peer: Peer, now: float) -> None:
        self._fail(
            f"{peer.name} has been in step {peer.step} for {now - peer.last_progress:.0f} s; "
            f"rank {self._me.rank} is in step {self._step}"
        )

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
        for peer in self.peers:
            peer.send(Fault(message))
        if tell_owner and self._on_failure is not None:
            self._on_failure(message)


# --- helpers -----------------------------------------------------------------------------------


def this_host() -> str:
    """A name for this host and its pid namespace: `<host name>/<pid namespace>`."""
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
