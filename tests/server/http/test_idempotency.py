"""Requests with an Idempotency-Key: repeats join the first one, or get its answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from millrace.server.http.idempotency import REPLAYED, IdempotentRequests
from tests.support.running import eventually, run


class Answering:
    """An application that counts what it is asked, and answers once `free` is set."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.free = asyncio.Event()
        self.free.set()
        self.status = 200
        self.kind = b"application/json"
        self.disconnected = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnected += 1
                return
            body += message["body"]
            more = message["more_body"]
        self.asked.append(body)
        headers = [(b"content-type", self.kind)]
        if self.kind != b"application/json":
            await send({"type": "http.response.start", "status": self.status, "headers": headers})
            free, gone = asyncio.create_task(self.free.wait()), asyncio.create_task(receive())
            await asyncio.wait([free, gone], return_when=asyncio.FIRST_COMPLETED)
            self.disconnected += gone.done()
            gone.cancel()
            free.cancel()
        else:
            await self.free.wait()
            await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"answer %d" % len(self.asked)})


class Client:
    """One request to an application; it can go away."""

    def __init__(
        self, app: Any, key: str | None = "k", body: bytes = b"{}", path: str = "/v1/completions",
        owner: str = "",
    ) -> None:  # fmt: skip
        self.gone = asyncio.Event()
        self.sent: list[Message] = []
        self._parts = [body[:1], body[1:]]
        headers = [] if key is None else [(b"idempotency-key", key.encode())]
        if owner:
            headers.append((b"x-cache-salt", owner.encode()))
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if self._parts:
            part = self._parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._parts)}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    async def answer(self) -> tuple[int, bytes, bool]:
        """(status, body, whether it was a repeat's)."""
        await self.task
        start, *pieces = self.sent
        body = b"".join(piece["body"] for piece in pieces)
        return start["status"], body, REPLAYED in start["headers"]


def test_a_repeat_gets_the_kept_answer_and_other_requests_their_own() -> None:
    async def main() -> None:
        inner = Answering()
        app = IdempotentRequests(inner)
        assert await Client(app).answer() == (200, b"answer 1", False)
        assert await Client(app).answer() == (200, b"answer 1", True)
        assert await Client(app, "other").answer() == (200, b"answer 2", False)
        assert await Client(app, None).answer() == (200, b"answer 3", False)
        chat = Client(app, path="/v1/chat/completions")
        assert await chat.answer() == (200, b"answer 4", False)
        assert await Client(app, owner="b").answer() == (200, b"answer 5", False)
        assert len(app) == 4

    run(main())


def test_a_repeat_joins_a_request_whose_client_has_gone() -> None:
    async def main() -> None:
        inner = Answering()
        inner.free.clear()
        app = IdempotentRequests(inner)
        first = Client(app)
        await eventually(lambda: inner.asked)
        first.gone.set()
        await first.task
        assert first.sent == []
        repeats = [Client(app) for _ in range(3)]
        repeats[2].gone.set()
        await repeats[2].task
        inner.free.set()
        assert [await one.answer() for one in repeats[:2]] == [(200, b"answer 1", True)] * 2
        assert len(inner.asked) == 1
        assert inner.disconnected == 0

    run(main())


def test_a_key_goes_with_one_body() -> None:
    async def main() -> None:
        app = IdempotentRequests(Answering())
        await Client(app).answer()
        status, body, _ = await Client(app, body=b'{"a":1}').answer()
        assert status == 422
        assert json.loads(body)["error"]["code"] == "idempotency_key_reused"
        status, _, _ = await Client(app, "k" * 300).answer()
        assert status == 400

    run(main())


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_be_tried_again_is_tried_again(status: int) -> None:
    async def main() -> None:
        inner = Answering()
        app = IdempotentRequests(inner)
        inner.status = status
        assert await Client(app).answer() == (status, b"answer 1", False)
        inner.status = 200
        assert await Client(app).answer() == (200, b"answer 2", False)

    run(main())


def test_streams_are_passed_on_and_end_with_their_client() -> None:
    async def main() -> None:
        inner = Answering()
        inner.kind = b"text/event-stream; charset=utf-8"
        app = IdempotentRequests(inner)
        assert await Client(app).answer() == (200, b"answer 1", False)
        assert await Client(app).answer() == (200, b"answer 2", False)
        inner.free.clear()
        stream = Client(app)
        await eventually(lambda: stream.sent)
        stream.gone.set()
        await stream.task
        await eventually(lambda: inner.disconnected)
        await eventually(lambda: not len(app))

    run(main())


def test_what_is_kept_is_bounded() -> None:
    async def main() -> None:
        inner = Answering()
        app = IdempotentRequests(inner, max_answers=3, max_bytes=20)
        for number in range(5):
            await Client(app, str(number)).answer()
        assert len(app) == 2  # of 8 bytes each
        assert (await Client(app, "4").answer())[2]
        assert not (await Client(app, "0").answer())[2]
        inner.free.clear()
        running = [Client(app, f"r{number}") for number in range(5)]
        await eventually(lambda: len(inner.asked) == 11)
        assert len(app) == 3
        inner.free.set()
        assert all([(await one.answer())[0] == 200 for one in running])

    run(main())


def test_a_failure_of_the_application_is_an_answer() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        raise RuntimeError("broken")

    async def main() -> None:
        app = IdempotentRequests(broken)
        assert (await Client(app).answer())[0] == 500
        assert len(app) == 0

    run(main())
