"""The sockets on which a gateway listens, and how its processes inherit them.

A gateway of several processes has a set of sockets for each (SO_REUSEPORT), and the kernel spreads
connections over them. The main process opens all sets and holds them, so that connections that wait
at the socket of a process survive it. Every process inherits all sets: it serves its own, and for a
while those of processes that have died. Nothing here accepts a connection.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence

import msgspec

from millrace.common.sockets import listen, listen_unix, require_free_port
from millrace.gateway.http.message import Via
from millrace.gateway.processes.options import GatewayOptions


class Listener:
    """One socket that listens. via: the kind of clients that it is for. port: 0 for a Unix
    socket."""

    def __init__(self, via: Via, opened: socket.socket) -> None:
        self.via = via
        self.socket = opened
        self.port = 0 if via == "unix" else int(opened.getsockname()[1])


ListenerSet = Sequence[Listener]


def open_listeners(options: GatewayOptions, sets: int = 1) -> list[list[Listener]]:
    """As many sets as there are processes; the Unix socket is in the first one only.

    Where a port is 0, all sets have the same free one. Raises ConfigError for an address that
    cannot be had.
    """
    ports: list[tuple[Via, str, int]] = [("public", options.host, options.port)]
    if options.admin_port is not None:
        ports.append(("admin", options.admin_host, options.admin_port))
    for _, host, port in ports if sets > 1 else ():
        require_free_port(host, port)  # another program that shares it would go unnoticed below
    opened: list[list[Listener]] = []
    try:
        for _ in range(sets):
            opened.append([])
            for via, host, port in ports:
                # Those of the first set have the port already.
                port = port_of(opened[0], via) or port
                sockets = listen(host, port, shared=sets > 1)
                opened[-1] += [Listener(via, one) for one in sockets]
        if options.admin_uds is not None:
            opened[0].append(Listener("unix", listen_unix(options.admin_uds, "--admin-uds")))
    except BaseException:
        close_listeners(*opened)
        raise
    return opened


def port_of(listeners: ListenerSet, via: Via) -> int:
    """The TCP port for clients of that kind; 0 if there is none."""
    return next((one.port for one in listeners if one.via == via), 0)


def close_listeners(*sets: ListenerSet) -> None:
    """Close all sets in this process. A socket still listens while another process holds it."""
    for listener in (one for listeners in sets for one in listeners):
        listener.socket.close()


def remove_unix_socket(path: str | None) -> None:
    """Remove the file of the Unix socket, once nobody listens there any more."""
    if path is not None:
        with contextlib.suppress(OSError):
            os.unlink(path)


class Inherited(msgspec.Struct, frozen=True):
    """A listener as the main process names it to another one. fd: a descriptor in both."""

    via: Via
    fd: int


def inheritable(sets: Sequence[ListenerSet]) -> list[list[Inherited]]:
    """What `inherit` needs in a process that gets the descriptors of all sets."""
    return [[Inherited(one.via, one.socket.fileno()) for one in listeners] for listeners in sets]


def inherit(sets: Sequence[Sequence[Inherited]]) -> list[list[Listener]]:
    """In a process that was started with these descriptors: the listeners."""
    made = [[Listener(one.via, socket.socket(fileno=one.fd)) for one in row] for row in sets]
    for listener in (one for row in made for one in row):
        listener.socket.set_inheritable(False)
        listener.socket.setblocking(False)
    return made
