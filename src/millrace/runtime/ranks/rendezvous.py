"""How the ranks of one replica find each other: all connect to rank 0, and are compared.

They meet before anything else; what they run must be the same everywhere. What they have from here
are the connections that the watch (`heartbeat.py`) keeps an eye on.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping

from torch._C._distributed_c10d import Store

from millrace.common.framing import FramingError
from millrace.errors import ConfigError, RankError
from millrace.runtime.ranks.heartbeat import (
    FRAMING,
    Fate,
    Fault,
    Heartbeat,
    Hello,
    Peer,
    no_fate,
    this_host,
)


def rendezvous(
    rank: int,
    size: int,
    address: str,
    store: Store,
    facts: dict[str, str],
    fate: Fate,
    on_failure: Callable[[str], None] | None,
    limit: float,
) -> Heartbeat:
    """Connect to all other ranks (rank 0) or to rank 0 at `address`, and compare notes.

    store: where rank 0 says on which port it waits. Raises as `gather` and `introduce` do.
    """
    if rank == 0:
        token = secrets.token_hex(16)
        with listen(address) as listener:
            store.set("watch", f"{listener.getsockname()[1]} {token}")
            me = Hello(0, os.getpid(), this_host(), token, facts)
            peers = gather(listener, me, size, limit, fate)
    else:
        port, token = store.get("watch").decode().split()
        me = Hello(rank, os.getpid(), this_host(), token, facts)
        peers = [introduce((address, int(port)), me, limit)]
    return Heartbeat(me, peers, fate, on_failure)


def listen(address: str) -> socket.socket:
    """A listening socket on that host name or address if it is ours, else on all interfaces."""
    for host in (address, ""):
        try:
            return socket.create_server((host, 0))
        except OSError:
            continue
    raise ConfigError(f"cannot listen on {address}; set MASTER_ADDR to an address of this host")


def gather(
    listener: socket.socket, me: Hello, size: int, limit: float, fate: Fate = no_fate
) -> list[Peer]:
    """Rank 0: wait for all others, and compare them with ourselves.

    Raises RankError for a rank that ended or did not come within `limit` seconds, ConfigError for
    one that is unlike this one; the others are told.
    """
    found: dict[int, Peer] = {}
    deadline = time.monotonic() + limit
    listener.settimeout(0.1)
    try:
        while len(found) < size - 1:
            _require_coming(range(1, size), found, fate, deadline, limit)
            peer = _accept(listener, me)
            if peer is not None:
                found[peer.hello.rank] = peer
        peers = [found[rank] for rank in sorted(found)]
        _compare(me, peers)
    except Exception as error:
        for peer in found.values():
            peer.send(Fault(str(error)))
            peer.sock.close()
        raise
    for peer in peers:
        peer.send(me)
    return peers


def _require_coming(
    ranks: range, found: Mapping[int, Peer], fate: Fate, deadline: float, limit: float
) -> None:
    missing = [rank for rank in ranks if rank not in found]
    for rank in missing:
        if (end := fate(rank)) is not None:
            raise RankError(f"rank {rank} {end} before it had joined")
    if time.monotonic() > deadline:
        names = ", ".join(f"rank {rank}" for rank in missing)
        raise RankError(f"{names} did not join within {limit:.0f} s")


def _accept(listener: socket.socket, me: Hello) -> Peer | None:
    """The next rank that knows the token; None if nobody, or a stranger, came."""
    try:
        sock, _ = listener.accept()
    except TimeoutError:
        return None
    try:
        sock.settimeout(5.0)
        hello = FRAMING.receive_from(sock)
    except (OSError, FramingError):
        sock.close()
        return None
    if not isinstance(hello, Hello) or not hmac.compare_digest(hello.token, me.token):
        sock.close()
        return None
    return Peer(sock, hello)


def _compare(me: Hello, peers: list[Peer]) -> None:
    for peer in peers:
        for name, ours in me.facts.items():
            theirs = peer.hello.facts.get(name, "nothing")
            if theirs != ours:
                raise ConfigError(
                    f"{peer.name} has another {name}: {theirs}, where rank 0 has {ours}; "
                    "start all ranks alike"
                )


def introduce(address: tuple[str, int], me: Hello, limit: float) -> Peer:
    """Other ranks: connect to rank 0 and wait until it has met everybody.

    Raises RankError with rank 0's reason if the group does not come together.
    """
    try:
        sock = socket.create_connection(address, timeout=limit)
        sock.settimeout(limit)
        sock.sendall(FRAMING.encode(me))
        answer = FRAMING.receive_from(sock)
    except (OSError, FramingError) as error:
        raise RankError(
            f"rank 0 at {address[0]} port {address[1]} does not answer: {error}"
        ) from None
    if isinstance(answer, Hello):
        return Peer(sock, answer)
    sock.close()
    raise RankError(answer.message if isinstance(answer, Fault) else "rank 0 has left")
