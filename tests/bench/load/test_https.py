"""Runs over TLS: one context a process, certificates checked unless told not to."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from millrace.bench.load.load_driver import Job, Load
from millrace.bench.load.records import RequestTiming
from millrace.bench.measure.client_overhead import connect_share
from millrace.common.http_client import Target, encode_request, fetch, ssl_context
from tests.support.running import run

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")

EVENT = b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\n'
ANSWER = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(EVENT) + EVENT


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("tls")
    options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=t"
    files = (place / "c.pem", place / "k.pem")
    subprocess.run(
        ["openssl", *options.split(), "-out", files[0], "-keyout", files[1]],
        check=True, capture_output=True,
    )  # fmt: skip
    return files


@asynccontextmanager
async def closing_server(certificate: tuple[Path, Path]) -> AsyncIterator[int]:
    """Answers one request a connection over TLS; gives its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(ANSWER)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def driven(certificate: tuple[Path, Path], *, verify: bool, count: int = 6) -> list[RequestTiming]:
    async def scenario() -> list[RequestTiming]:
        async with closing_server(certificate) as port:
            target = Target("127.0.0.1", port, tls=True, verify=verify)
            job = Job(encode_request(target, "GET", "/x"), 1)
            return await Load([target], [job] * count, [None] * count, limit=1).run()

    return run(scenario())


def test_all_connections_of_a_process_share_a_context(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[ssl.SSLContext] = []
    create = ssl.create_default_context

    def noting(purpose: ssl.Purpose = ssl.Purpose.SERVER_AUTH) -> ssl.SSLContext:
        context = create(purpose)
        if purpose is ssl.Purpose.SERVER_AUTH:
            made.append(context)
        return context

    monkeypatch.setattr(ssl, "create_default_context", noting)
    ssl_context.cache_clear()
    records = driven(certificate, verify=False)
    assert [record.error for record in records] == [None] * 6
    assert len(made) == 1


def test_what_connections_took_is_measured(certificate: tuple[Path, Path]) -> None:
    records = driven(certificate, verify=False)
    assert all(record.connect_ns > 0 for record in records)
    assert 0 < connect_share(records) < 1


def test_a_certificate_is_checked_unless_told_not_to(certificate: tuple[Path, Path]) -> None:
    (record,) = driven(certificate, verify=True, count=1)
    assert "certificate verify failed" in str(record.error)

    async def asked(verify: bool) -> int:
        async with closing_server(certificate) as port:
            target = Target("127.0.0.1", port, tls=True, verify=verify)
            return (await fetch(target, "/health")).status

    assert run(asked(False)) == 200
    with pytest.raises(ssl.SSLCertVerificationError):
        run(asked(True))
