"""Listening sockets and TLS contexts, the same for every server of Millrace.

The functions take plain arguments, and their errors name the flags that all servers share. What is
served on a socket is not known here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import stat

from millrace.errors import ConfigError

BACKLOG = 4096  # connections that wait to be accepted
# A client that is gone without a word, or that reads nothing for so long, is given up.
KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 3}  # seconds, probes
UNREAD_SECONDS = 600
_FAMILY_IS_OFF = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # IPv6 on a system without it


def bind(host: str, port: int, *, shared: bool = False) -> list[socket.socket]:
    """Sockets bound to the port at every address of the host; they do not listen.

    port 0: any free one, the same at each address. shared: other processes may bind it as well
    (SO_REUSEPORT). Raises ConfigError if the host is unknown or the port cannot be had.
    """
    bound: list[socket.socket] = []
    skipped: OSError | None = None
    addresses = _addresses(host, port)
    for family, address in addresses:
        own_port = bound[0].getsockname()[1] if bound else port
        one_family = len(addresses) > 1 and family == socket.AF_INET6
        try:
            bound.append(_bound(family, (address[0], own_port, *address[2:]), shared, one_family))
        except OSError as error:
            skipped = error
            if error.errno not in _FAMILY_IS_OFF:
                break
    if skipped is not None and (not bound or skipped.errno not in _FAMILY_IS_OFF):
        for one in bound:
            one.close()
        raise _cannot_listen(host, port, skipped) from None
    return bound


def _bound(
    family: int, address: tuple[object, ...], shared: bool, one_family: bool
) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if one_family:  # the host has a socket for IPv4 as well
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
    except BaseException:
        one.close()
        raise
    return one


def listen(host: str, port: int, *, shared: bool = False) -> list[socket.socket]:
    """Sockets that listen, as `bind` makes them; connections that fall silent are given up.

    They do not block. Raises ConfigError as `bind`.
    """
    listeners = bind(host, port, shared=shared)
    try:
        for one in listeners:
            give_up_on_silence(one)
            one.listen(BACKLOG)
            one.setblocking(False)
    except OSError as error:
        for one in listeners:
            one.close()
        raise _cannot_listen(host, port, error) from None
    return listeners


def listen_unix(path: str, flag: str) -> socket.socket:
    """A Unix socket that listens, for this user alone (mode 0600); one without a listener is
    replaced. It does not block. Raises ConfigError, which names the flag, if it cannot be had."""
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            if _has_listener(path):
                raise ConfigError(f"{flag} {path}: another process listens there")
            os.unlink(path)
        before = os.umask(0o177)
        try:
            one.bind(path)
        finally:
            os.umask(before)
        one.listen(BACKLOG)
        one.setblocking(False)
    except ConfigError:
        one.close()
        raise
    except OSError as error:
        one.close()
        raise ConfigError(f"{flag} {path}: {error.strerror or error}") from None
    return one


def _has_listener(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def require_free_port(host: str, port: int) -> None:
    """Raise ConfigError if nobody can listen there now."""
    for one in bind(host, port):
        one.close()


def free_port(host: str) -> int:
    """A TCP port of one address that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def give_up_on_silence(listener: socket.socket) -> None:
    """Set the options by which accepted connections end when the client is gone, where the system
    has them."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    timeouts = {**KEEP_ALIVE, "TCP_USER_TIMEOUT": UNREAD_SECONDS * 1000}
    for name, value in timeouts.items():
        option = getattr(socket, name, None)
        if option is not None:
            with contextlib.suppress(OSError):
                listener.setsockopt(socket.IPPROTO_TCP, option, value)


def tls_context(
    certfile: str | None,
    keyfile: str | None = None,
    ca_certs: str | None = None,
    cert_reqs: int = 0,
) -> ssl.SSLContext | None:
    """A server's TLS context from PEM files; None for plain HTTP, where no file is named.

    keyfile: None if certfile holds the key too. ca_certs: who may sign clients' certificates.
    cert_reqs: as in the ssl module. Raises ConfigError, which names the flag at fault.
    """
    if not certfile:
        if keyfile or ca_certs or cert_reqs:
            raise ConfigError(
                "--ssl-certfile is missing; HTTPS needs a certificate and its key, "
                "so --ssl-certfile and --ssl-keyfile go together"
            )
        return None
    named = {"--ssl-certfile": certfile, "--ssl-keyfile": keyfile, "--ssl-ca-certs": ca_certs}
    for flag, path in named.items():
        if path:
            _require_readable(flag, path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certfile, keyfile)
    except (ssl.SSLError, OSError) as error:
        files = f"--ssl-certfile {certfile}"
        if keyfile:
            raise ConfigError(f"{files}, --ssl-keyfile {keyfile}: {error}") from None
        raise ConfigError(
            f"{files}: {error}; it and --ssl-keyfile go together unless it holds the key too"
        ) from None
    if ca_certs:
        try:
            context.load_verify_locations(ca_certs)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"--ssl-ca-certs {ca_certs}: {error}") from None
    try:
        context.verify_mode = ssl.VerifyMode(cert_reqs)
    except ValueError:
        raise ConfigError(f"--ssl-cert-reqs {cert_reqs}: use 0, 1 or 2") from None
    return context


def _require_readable(flag: str, path: str) -> None:
    try:
        with open(path, "rb"):
            return
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from None


def _addresses(host: str, port: int) -> list[tuple[int, tuple[object, ...]]]:
    """(family, address) of a host, each once, in the resolver's order."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a host name"
        raise ConfigError(f"host {host!r}: {reason}") from None
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    why = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
    return ConfigError(
        f"cannot listen on {host} port {port}: {why}; choose another --host or --port"
    )
