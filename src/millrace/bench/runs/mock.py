"""A mock server that streams at a fixed pace and stamps its send times into the chunks.

For `millrace bench selftest`; it is a process of its own, so that it takes no time of the client.
Chunks look like a real server's. Each has `sent_ns`, when it was passed to the kernel, and
`received_ns`, when the request had been read (both on the host's monotonic clock).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from time import perf_counter_ns
from typing import Any, cast

import httptools
import msgspec
import uvloop

MODEL = "selftest"
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class _Usage(msgspec.Struct, frozen=True):
    include_usage: bool = False


class _Body(msgspec.Struct):
    prompt: str | list[int] = ""
    messages: list[Any] = []
    max_tokens: int = 16
    stream_options: _Usage = _Usage()

    @property
    def prompt_tokens(self) -> int:
        if isinstance(self.prompt, list):
            return len(self.prompt)
        texts = [str(m.get("content", "")) for m in self.messages] or [self.prompt]
        return sum(len(text.split()) for text in texts)


class _Stream(asyncio.Protocol):
    """One connection; one answer at a time."""

    def __init__(self, first_s: float, gap_s: float) -> None:
        self._first_s, self._gap_s = first_s, gap_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self._path = b""

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._received_ns = perf_counter_ns()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            if self._transport is not None:
                self._transport.abort()

    # --- httptools callbacks -------------------------------------------------------------------

    def on_url(self, url: bytes) -> None:
        self._path, self._body = url, b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._parser.get_method() == b"GET":
            self._plain()
            return
        self._request = msgspec.json.decode(self._body, type=_Body)
        self._chat = b"/chat/" in self._path
        self._sent = 0
        self._due = self._loop.time() + self._first_s
        self._loop.call_at(self._due, self._send_chunk)

    # --- answers -------------------------------------------------------------------------------

    def _plain(self) -> None:
        known = self._path in (b"/health", b"/v1/models")
        card = {"id": MODEL, "object": "model", "vocab_size": 1000}
        body = msgspec.json.encode({"object": "list", "data": [card]} if known else {})
        status = b"200 OK" if known else b"404 Not Found"
        self._write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

    def _send_chunk(self) -> None:
        self._sent += 1
        last = self._sent == self._request.max_tokens
        finish = b'"length"' if last else b"null"
        text = b'"delta":{"content":" word"}' if self._chat else b'"text":" word"'
        data = (
            b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"selftest",'
            b'"sent_ns":%d,"received_ns":%d,"choices":[{"index":0,%b,"logprobs":null,'
            b'"finish_reason":%b}]}' % (perf_counter_ns(), self._received_ns, text, finish)
        )
        begin = _HEAD if self._sent == 1 else b""
        self._write(begin + _event(data) + (self._end() if last else b""))
        if not last:
            self._due += self._gap_s
            self._loop.call_at(self._due, self._send_chunk)

    def _end(self) -> bytes:
        usage_event = b""
        if self._request.stream_options.include_usage:
            prompt, output = self._request.prompt_tokens, self._request.max_tokens
            usage = {"prompt_tokens": prompt, "completion_tokens": output}
            usage_event = _event(msgspec.json.encode({"choices": [], "usage": usage}))
        return usage_event + _event(b"[DONE]") + b"0\r\n\r\n"

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


def _event(data: bytes) -> bytes:
    return b"%x\r\ndata: %b\n\n\r\n" % (len(data) + 8, data)


async def _serve(first_s: float, gap_s: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Stream(first_s, gap_s), "127.0.0.1", 0, backlog=8192)
    print(server.sockets[0].getsockname()[1], flush=True)
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    parent = os.getppid()
    while not stop.is_set() and os.getppid() == parent:  # a mock whose parent has ended ends too
        try:
            await asyncio.wait_for(stop.wait(), 1.0)
        except TimeoutError:
            continue
    print(time.process_time(), flush=True)
    os._exit(0)


def main() -> None:
    """Serve until SIGTERM: prints the port, and at the end the CPU seconds that it took."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    uvloop.run(_serve(float(sys.argv[1]), float(sys.argv[2])))


if __name__ == "__main__":
    main()
