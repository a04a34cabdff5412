"""A server that answers every request with what it asked, and counts who asked what how often."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

Reply = tuple[int, dict[str, Any], dict[str, str]]  # status, body, headers


def chat_line(number: int, content: str | None = None, **body: Any) -> dict[str, Any]:
    """A request line. Its content names it, unless another one is given."""
    messages = [{"role": "user", "content": content or f"document {number}"}]
    return {
        "custom_id": f"id-{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "mock", "messages": messages, **body},
    }


def answer(content: str) -> dict[str, Any]:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    message = {"role": "assistant", "content": f"about {content}"}
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}


class CountingServer:
    """Runs in a thread of its own. seconds: that an answer takes at most, at random.

    judge: replies instead, or None for the usual reply; a status of 0 closes the connection.
    slots: requests that are answered at the same time; others wait.
    """

    def __init__(self, seconds: float = 0.0, slots: int = 1000) -> None:
        self.asked: Counter[str] = Counter()  # by what the prompt says
        self.keys: Counter[str] = Counter()
        self.order: deque[str] = deque(maxlen=10_000)
        self.headers: list[dict[str, str]] = []
        self.most_open = 0
        self.judge: Callable[[str], Reply | None] = lambda content: None
        self._seconds = seconds
        self._open = 0
        self._slots = slots
        self._random = random.Random(1)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while await self._one(reader, writer):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        lines = head.strip().split("\r\n")[1:]
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        content = body["messages"][-1]["content"]
        self.asked[content] += 1
        self.keys[headers.get("idempotency-key", "")] += 1
        self.order.append(content)
        self.headers.append(headers)
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        try:
            async with self._free:
                if self._seconds:
                    await asyncio.sleep(self._random.random() * self._seconds)
                status, reply, more = self.judge(content) or (200, answer(content), {})
        finally:
            self._open -= 1
        if not status:
            writer.transport.abort()
            return False
        data = json.dumps(reply, indent=1).encode()
        more_lines = "".join(f"{name}: {value}\r\n" for name, value in more.items())
        writer.write(
            f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n{more_lines}\r\n".encode()
            + data
        )
        await writer.drain()
        return True

    async def _main(self) -> None:
        self._free = asyncio.Semaphore(self._slots)
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._started.set()
        await self._stop.wait()
        server.close()

    @contextlib.contextmanager
    def running(self) -> Iterator[CountingServer]:
        self._started = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        thread.start()
        assert self._started.wait(30)
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join(30)
