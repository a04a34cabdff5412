"""Requests that offer another protocol are read as if they did not."""

from __future__ import annotations

import httptools
import pytest

from millrace.request_parser import RequestParser

BODY = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = (
    b"POST /a?b HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMA\r\nX-Mine: 1\r\n"
)
LENGTH = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
NEXT = b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n"
SOCKET = b"GET /s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


class Requests:
    """Collects (method, target, header names, body)."""

    def __init__(self) -> None:
        self.parser = RequestParser(self, self._take)
        self.seen: list[tuple[bytes, bytes, set[bytes], bytes]] = []

    def on_message_begin(self) -> None:
        self._target, self._body = b"", b""
        self._headers: list[tuple[bytes, bytes]] = []

    def _take(self) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        return self._target, self._headers

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if not self.parser.again:
            names = {name for name, _ in self._headers}
            self.seen.append((self.parser.get_method(), self._target, names, self._body))


@pytest.mark.parametrize("data", [LENGTH, CHUNKS], ids=["length", "chunks"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_the_body_belongs_to_the_request(data: bytes, size: int) -> None:
    requests = Requests()
    whole = data + NEXT + SOCKET + NEXT
    for at in range(0, len(whole), size):
        requests.parser.feed_data(whole[at : at + size])
    assert [(m, t) for m, t, _, _ in requests.seen] == [
        (b"POST", b"/a?b"), (b"GET", b"/next"), (b"GET", b"/s"), (b"GET", b"/next")
    ]  # fmt: skip
    _, _, names, body = requests.seen[0]
    assert body == BODY
    assert {b"x-mine", b"host"} <= names
    assert not names & {b"upgrade", b"http2-settings"}


def test_a_tunnel_is_refused() -> None:
    with pytest.raises(httptools.HttpParserError, match="CONNECT"):
        Requests().parser.feed_data(b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n")
