"""httptools' parser of HTTP/1.1 requests, without upgrades: what every server of Millrace reads by.

A client may offer another protocol with a request (`Upgrade: h2c`, as Java's client does), and a
server may ignore the offer. httptools does not: it takes the request for complete behind its head,
and its body for something else. As the next request it would be one that a proxy has not seen. So
the head is parsed again, without the offer. What a request means is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import httptools

Head = tuple[bytes, Sequence[tuple[bytes, bytes]]]  # target; headers
_OFFERS = frozenset((b"upgrade", b"http2-settings"))


class RequestParser:
    """Calls `protocol` as httptools does. The protocol ignores `on_headers_complete` and
    `on_message_complete` while `again` is true: the head will come once more.

    read_head: the target and the headers that the protocol has got; it forgets them.
    data_after_close: bytes behind the last request are no error.
    """

    def __init__(
        self, protocol: object, read_head: Callable[[], Head], *, data_after_close: bool = False
    ) -> None:
        self._protocol = protocol
        self._data_after_close = data_after_close
        self._read_head = read_head
        self._parser = self._make()

    def _make(self) -> httptools.HttpRequestParser:
        made = httptools.HttpRequestParser(self._protocol)
        if self._data_after_close and hasattr(made, "set_dangerous_leniencies"):
            made.set_dangerous_leniencies(lenient_data_after_close=True)
        return made

    @property
    def again(self) -> bool:
        """Whether this head offers an upgrade."""
        return bool(self._parser.should_upgrade())

    def feed_data(self, data: bytes) -> None:
        """Parse more bytes. Raises httptools.HttpParserError."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            method, version = self._parser.get_method(), self._parser.get_http_version()
            if method == b"CONNECT":
                raise httptools.HttpParserError("CONNECT is not served") from None
            target, headers = self._read_head()
            kept = [(name, value) for name, value in headers if name.lower() not in _OFFERS]
            lines = [b"%b %b HTTP/%b" % (method, target, version.encode())]
            lines += [b"%b: %b" % header for header in kept]
            self._parser = self._make()
            self.feed_data(b"\r\n".join((*lines, b"\r\n")) + data[upgrade.args[0] :])

    def get_method(self) -> bytes:
        return self._parser.get_method()

    def get_http_version(self) -> str:
        return self._parser.get_http_version()

    def should_keep_alive(self) -> bool:
        return self._parser.should_keep_alive()

    def should_upgrade(self) -> bool:
        """Never: the offer is ignored."""
        return False
