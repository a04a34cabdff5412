"""Listening sockets and TLS contexts: what they are, and one line for what cannot be."""

from __future__ import annotations

import socket
import ssl
import subprocess
from pathlib import Path

import pytest

from millrace.common.sockets import (
    UNREAD_SECONDS,
    bind,
    free_port,
    listen,
    require_free_port,
    tls_context,
)
from millrace.errors import ConfigError


def close(sockets: list[socket.socket]) -> None:
    for one in sockets:
        one.close()


def test_a_listener_takes_connections_that_end_when_the_client_falls_silent() -> None:
    (listener,) = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    assert listener.getblocking() is False
    with socket.create_connection(("127.0.0.1", port)), listener:
        listener.settimeout(10)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                limit = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
                assert limit == UNREAD_SECONDS * 1000


def test_a_port_that_is_in_use_is_named() -> None:
    (taken,) = listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with taken:
        for attempt in (listen, bind, require_free_port):
            with pytest.raises(ConfigError, match=f"127.0.0.1 port {port}: it is in use; choose"):
                attempt("127.0.0.1", port)
    require_free_port("127.0.0.1", port)


def test_processes_share_a_port_that_is_held_for_them() -> None:
    (held,) = bind("127.0.0.1", 0, shared=True)
    port = held.getsockname()[1]
    with held:
        listeners = [listen("127.0.0.1", port, shared=True)[0] for _ in range(2)]
        with pytest.raises(ConfigError, match="in use"):
            listen("127.0.0.1", port)
        with socket.create_connection(("127.0.0.1", port)):
            close(listeners)


def test_every_address_of_a_host_has_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    two = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.2", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [*two, two[0]])
    bound = bind("both", 0)
    names = [one.getsockname() for one in bound]
    close(bound)
    assert [host for host, _ in names] == ["127.0.0.1", "127.0.0.2"]
    assert names[0][1] == names[1][1] != 0


def test_an_address_that_the_system_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    here = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    elsewhere = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))  # a documentation net
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [elsewhere, here])
    bound = bind("both", 0)
    assert [one.getsockname()[0] for one in bound] == ["127.0.0.1"]
    close(bound)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [elsewhere])
    with pytest.raises(ConfigError, match=r"cannot listen on other port 0: .*; choose another"):
        bind("other", 0)


@pytest.mark.parametrize("host", ["no such host", "a" * 70 + ".", "é" * 70])
def test_an_unknown_host_is_named(host: str) -> None:
    with pytest.raises(ConfigError, match=f"host {host!r}: "):
        bind(host, 0)


def test_a_free_port_can_be_had() -> None:
    require_free_port("127.0.0.1", free_port("127.0.0.1"))


# --- TLS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder: Path = tmp_path_factory.mktemp("tls")
    certificate, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


def test_contexts_of_files_that_work(files: tuple[str, str], tmp_path: Path) -> None:
    certificate, key = files
    assert tls_context(None) is None
    assert isinstance(tls_context(certificate, key), ssl.SSLContext)
    both = tmp_path / "both.pem"
    both.write_text(Path(certificate).read_text() + Path(key).read_text())
    assert isinstance(tls_context(str(both)), ssl.SSLContext)
    strict = tls_context(certificate, key, certificate, 2)
    assert strict is not None
    assert strict.verify_mode == ssl.CERT_REQUIRED
    assert len(strict.get_ca_certs()) == 1


def test_files_that_do_not_work_are_named(files: tuple[str, str]) -> None:
    certificate, key = files
    for arguments, said in (
        ((None, key), "--ssl-certfile is missing"),
        ((None, None, certificate), "--ssl-certfile is missing"),
        (("", None, None, 2), "--ssl-certfile is missing"),
        (("/nowhere", key), "--ssl-certfile /nowhere: No such file"),
        ((certificate, "/nowhere"), "--ssl-keyfile /nowhere: No such file"),
        ((certificate, key, "/nowhere"), "--ssl-ca-certs /nowhere: No such file"),
        ((certificate,), "it and --ssl-keyfile go together"),
        ((key, key), f"--ssl-certfile {key}, --ssl-keyfile {key}: "),
        ((certificate, key, key), f"--ssl-ca-certs {key}: "),
        ((certificate, key, None, 7), "--ssl-cert-reqs 7: use 0, 1 or 2"),
    ):
        with pytest.raises(ConfigError) as raised:
            tls_context(*arguments)
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)
