"""Bodies on their way in: bounded each, bounded together, and their room comes back."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import Request
from starlette.types import Message

from millrace.common.api_errors import ApiError
from millrace.server.http.bodies import BodyReader


class Upload:
    """A request whose body comes in parts, as the test sends them; None: the client goes away."""

    def __init__(self, *parts: bytes) -> None:
        self.parts: asyncio.Queue[bytes | None] = asyncio.Queue()
        for part in parts:
            self.parts.put_nowait(part)
        self.request = Request({"type": "http", "method": "POST", "headers": []}, self._receive)

    async def _receive(self) -> Message:
        part = await self.parts.get()
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": part != b""}


async def refused(bodies: BodyReader, upload: Upload) -> ApiError:
    with pytest.raises(ApiError) as error:
        await bodies.read(upload.request)
    return error.value


def test_all_together_have_a_bound() -> None:
    async def run() -> None:
        bodies = BodyReader(max_bytes=100, max_total_bytes=100, read_timeout=5.0)
        slow = Upload(b"x" * 60)
        first = asyncio.create_task(bodies.read(slow.request))
        while not slow.parts.empty():
            await asyncio.sleep(0)
        error = await refused(bodies, Upload(b"y" * 41, b""))
        assert (error.status, error.headers["Retry-After"]) == (429, "1")
        assert await bodies.read(Upload(b"y" * 40, b"").request) == b"y" * 40
        slow.parts.put_nowait(b"")
        assert await first == b"x" * 60
        assert await bodies.read(Upload(b"z" * 100, b"").request) == b"z" * 100

    asyncio.run(run())


def test_whoever_fails_gives_its_room_back() -> None:
    async def run() -> None:
        bodies = BodyReader(max_bytes=80, max_total_bytes=100, read_timeout=0.01)
        assert (await refused(bodies, Upload(b"x" * 70, None))).status == 400
        assert (await refused(bodies, Upload(b"x" * 70))).status == 408
        assert (await refused(bodies, Upload(b"x" * 70, b"x" * 20, b""))).status == 413
        assert await bodies.read(Upload(b"z" * 80, b"").request) == b"z" * 80

    asyncio.run(run())


def test_a_body_that_only_drips_is_given_up() -> None:
    async def drip(upload: Upload) -> None:
        while True:
            upload.parts.put_nowait(b"x")
            await asyncio.sleep(0.02)

    async def run() -> None:
        bodies, upload = (
            BodyReader(max_bytes=80_000, max_total_bytes=80_000, read_timeout=0.2),
            Upload(),
        )
        dripping = asyncio.create_task(drip(upload))
        error = await asyncio.wait_for(refused(bodies, upload), 30)
        dripping.cancel()
        assert error.status == 408
        assert await bodies.read(Upload(b"z" * 80_000, b"").request) == b"z" * 80_000

    asyncio.run(run())
