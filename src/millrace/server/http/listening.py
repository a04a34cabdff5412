"""What the server asks of the machine before it serves: a port, certificates."""

from __future__ import annotations

import contextlib
import socket
import ssl

from millrace.errors import ConfigError
from millrace.server.options import ServerOptions

BACKLOG = 4096
# A client that is gone without a word, or that reads nothing for so long, is given up.
KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 3}  # seconds, probes
UNREAD_SECONDS = 600


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ConfigError if that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host {host!r}: {error.strerror}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _give_up_on_silence(listener)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port"
        ) from None
    listener.setblocking(False)
    return listener


def _give_up_on_silence(listener: socket.socket) -> None:
    """Options that accepted connections inherit; where the system has them."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    timeouts = {**KEEP_ALIVE, "TCP_USER_TIMEOUT": UNREAD_SECONDS * 1000}
    for name, value in timeouts.items():
        option = getattr(socket, name, None)
        if option is not None:
            with contextlib.suppress(OSError):
                listener.setsockopt(socket.IPPROTO_TCP, option, value)


def check_tls(options: ServerOptions) -> None:
    """Raise ConfigError unless the certificate and its key can be used."""
    if not options.ssl_certfile:
        if options.ssl_keyfile or options.ssl_ca_certs or options.ssl_cert_reqs:
            raise ConfigError("--ssl-certfile is missing; HTTPS needs a certificate")
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile)
        if options.ssl_ca_certs:
            context.load_verify_locations(options.ssl_ca_certs)
        ssl.VerifyMode(options.ssl_cert_reqs)
    except FileNotFoundError as error:
        raise ConfigError(
            "a file of --ssl-certfile, --ssl-keyfile or --ssl-ca-certs is not there"
        ) from error
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"--ssl-certfile {options.ssl_certfile}: {error}") from None
    except ValueError:
        raise ConfigError(f"--ssl-cert-reqs {options.ssl_cert_reqs}: use 0, 1 or 2") from None
