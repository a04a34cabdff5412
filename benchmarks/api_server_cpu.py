"""CPU time of the API server per streamed chunk, and the time that it adds to a request.

The engine is the echo engine of the tests, which computes nothing; the process time of the API
server is read before and after. Run from the checkout: `python benchmarks/api_server_cpu.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

import psutil
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.fake_engine import Behaviour
from tests.support.live_server import fake_server
from tests.support.text_model import write_text_model


def request(tokens: int, chat: bool, stream: bool) -> bytes:
    """An HTTP request for `tokens` output tokens."""
    prompt = {"messages": [{"role": "user", "content": "hello " * 20}]}
    body = json.dumps(
        {
            **(prompt if chat else {"prompt": "hello " * 20}),
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": stream,
        }
    ).encode()
    path = b"/v1/chat/completions" if chat else b"/v1/completions"
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" % path
    return b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body)


async def one_stream(host: str, port: int, data: bytes) -> int:
    """Send one request and count the events of its answer."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(data)
    events, tail = 0, b""
    while b"[DONE]" not in tail:
        received = await reader.read(1 << 16)
        if not received:
            raise RuntimeError("the server closed the connection")
        events += received.count(b"data: {")
        tail = tail[-16:] + received
    writer.close()
    return events


async def load(url: str, streams: int, tokens: int, chat: bool) -> int:
    host, port = url.removeprefix("http://").split(":")
    data = request(tokens, chat, stream=True)
    return sum(await asyncio.gather(*(one_stream(host, int(port), data) for _ in range(streams))))


def measure(streams: int, tokens: int, step: float, chat: bool, model: Path) -> None:
    behaviour = Behaviour(step=step)
    with tempfile.TemporaryDirectory() as directory:
        options = {"max_num_seqs": streams, "max_model_len": 4096}
        with fake_server(model, Path(directory) / "log", behaviour, **options) as server:
            front = psutil.Process(server.process.pid)
            uvloop.run(load(server.url, streams, 4, chat))  # warm
            before, began = front.cpu_times(), time.perf_counter()
            chunks = uvloop.run(load(server.url, streams, tokens, chat))
            after, wall = front.cpu_times(), time.perf_counter() - began
    user, system = after.user - before.user, after.system - before.system
    print(
        f"{streams:5} streams x {tokens} tokens, {'chat' if chat else 'text'}: "
        f"{(user + system) / chunks * 1e6:6.1f} us of CPU a chunk "
        f"(user {user / chunks * 1e6:.1f}, system {system / chunks * 1e6:.1f}); "
        f"{chunks / wall:,.0f} chunks/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step", type=float, default=0.03, help="seconds between tokens")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = write_text_model(Path(directory) / "model")
        for streams in (1, 32, 256):
            for chat in (False, True):
                measure(streams, options.tokens, options.step, chat, model)


if __name__ == "__main__":
    main()
