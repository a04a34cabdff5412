"""How the ranks of one replica find each other: all connect to rank 0, which compares them.

This happens before anything else, because all ranks must run the same code, options and weights.
The connections stay open for the heartbeat (`heartbeat.py`).
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
    ExitReason,
    Fault,
    Heartbeat,
    Hello,
    Peer,
    this_host,
    unknown_exit,
)


def rendezvous(
    rank: int,
    size: int,
    address: str,
    store: Store,
    facts: dict[str, str],
    exit_reason: ExitReason,
    on_failure: Callable[[str], None] | None,
    limit: float,
) -> Heartbeat:
    """Connect to all other ranks (rank 0), or to rank 0 at `address`, and compare the facts.

    store: where rank 0 publishes its port. Raises what `accept_ranks` and `connect_to_rank_0` do.
    """
    if rank == 0:
        token = secrets.token_hex(16)
        with listen(address) as listener:
            store.set("heartbeat", f"{listener.getsockname()[1]} {token}")
            me = Hello(0, os.getpid(), this_host(), token, facts)
            peers = accept_ranks(listener, me, size, limit, exit_reason)
    else:
        port, token = store.get("heartbeat").decode().split()
        me = Hello(rank, os.getpid(), this_host(), token, facts)
        peers = [connect_to_rank_0((address, int(port)), me, limit)]
    return Heartbeat(me, peers, exit_reason, on_failure)


def listen(address: str) -> socket.socket:
    """A listening socket on that address if this host has it, else on all interfaces."""
    for host in (address, ""):
        try:
            return socket.create_server((host, 0))
        except OSError:
            continue
    raise ConfigError(f"cannot listen on {address}; set MASTER_ADDR to an address of this host")


def accept_ranks(
    listener: socket.socket,
    me: Hello,
    size: int,
    limit: float,
    exit_reason: ExitReason = unknown_exit,
) -> list[Peer]:
    """Rank 0: wait for all other ranks, and compare their facts with `me`.

    Raises RankError if a rank ended or did not join within `limit` seconds, ConfigError if one has
    other facts. The ranks that have joined get the reason.
    """
    found: dict[int, Peer] = {}
    deadline = time.monotonic() + limit
    listener.settimeout(0.1)
    try:
        while len(found) < size - 1:
            _check_missing(range(1, size), found, exit_reason, deadline, limit)
            peer = _accept(listener, me)
            if peer is not None:
                found[peer.hello.rank] = peer
        peers = [found[rank] for rank in sorted(found)]
        _compare_facts(me, peers)
    except Exception as error:
        for peer in found.values():
            peer.send(Fault(str(error)))
            peer.sock.close()
        raise
    for peer in peers:
        peer.send(me)
    return peers


def _check_missing(
    ranks: range, found: Mapping[int, Peer], exit_reason: ExitReason, deadline: float, limit: float
) -> None:
    missing = [rank for rank in ranks if rank not in found]
    for rank in missing:
        if (end := exit_reason(rank)) is not None:
            raise RankError(f"rank {rank} {end} before it had joined")
    if time.monotonic() > deadline:
        names = ", ".join(f"rank {rank}" for rank in missing)
        raise RankError(f"{names} did not join within {limit:.0f} s")


def _accept(listener: socket.socket, me: Hello) -> Peer | None:
    """The next rank with the right token; None if there was no connection, or a wrong one."""
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


def _compare_facts(me: Hello, peers: list[Peer]) -> None:
    for peer in peers:
        for name, ours in me.facts.items():
            theirs = peer.hello.facts.get(name, "nothing")
            if theirs != ours:
                raise ConfigError(
                    f"{peer.name} has another {name}: {theirs}, where rank 0 has {ours}; "
                    "start all ranks with the same"
                )


def connect_to_rank_0(address: tuple[str, int], me: Hello, limit: float) -> Peer:
    """Other ranks: connect to rank 0 and wait until all ranks have joined.

    Raises RankError, with rank 0's reason, if the group is not complete in time.
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
