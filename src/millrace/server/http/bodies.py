"""What every endpoint needs of HTTP: bodies within bounds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request

from millrace.server.http.errors import ApiError

MAX_PAUSES = 4  # that a body may take in all, and
MIN_BYTES_PER_SECOND = 16 * 2**10  # the bytes a second that it must bring to take longer


@dataclass(slots=True)
class BodyReader:
    """Bodies on their way in: each of at most `each` bytes, all together of at most `together`;
    one of which nothing more comes for `pause` seconds, or only drops, is given up."""

    max_bytes: int
    max_total_bytes: int
    read_timeout: float
    _buffered: int = field(default=0, init=False)

    async def read(self, request: Request) -> bytes:
        """A JSON body. Raises ApiError: 413 for too large a body, 415 for another content type, 408
        for a pause, 429 while others take all the room.
        """
        kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise ApiError(415, f"content type {kind!r}; send application/json")
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            await self._fill(body, request)
        except ClientDisconnect:
            raise ApiError(400, "the body ended early") from None
        except TimeoutError:
            raise ApiError(
                408,
                f"no more of the body came for {self.read_timeout:g} s, or only drops",
                code="request_timeout",
                headers={"Connection": "close"},
            ) from None
        finally:
            self._buffered -= len(body)
        return bytes(body)

    async def _fill(self, body: bytearray, request: Request) -> None:
        now = asyncio.get_running_loop().time
        last = now() + MAX_PAUSES * self.read_timeout
        async with asyncio.timeout(self.read_timeout) as clock:
            async for part in request.stream():
                clock.reschedule(
                    min(now() + self.read_timeout, last + len(body) / MIN_BYTES_PER_SECOND)
                )
                if self._buffered + len(part) > self.max_total_bytes:
                    raise self._no_room()
                body += part
                self._buffered += len(part)
                if len(body) > self.max_bytes:
                    raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self.max_bytes} bytes; --max-body-bytes sets the limit",
            code="body_too_large",
            headers={"Connection": "close"},
        )

    def _no_room(self) -> ApiError:
        return ApiError(
            429,
            f"bodies of {self.max_total_bytes} bytes are being read already, as many as "
            "--max-bodies-bytes allows; retry later",
            code="too_many_bytes",
            headers={"Connection": "close", "Retry-After": "1"},
        )
