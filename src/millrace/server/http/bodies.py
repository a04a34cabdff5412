"""Request bodies within bounds: of one body, of all bodies together, and of the time they take."""

from __future__ import annotations

import asyncio
from codecs import BOM_UTF8
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request

from millrace.common.api_errors import ApiError

MAX_PAUSES = 4
MIN_BYTES_PER_SECOND = 16 * 2**10


@dataclass(slots=True)
class BodyReader:
    """Reads bodies. max_bytes: of one body; max_total_bytes: of all that are being read.

    read_timeout: seconds that may pass between two parts of a body. A body may take MAX_PAUSES
    times that in all, and longer only where it brings MIN_BYTES_PER_SECOND.
    """

    max_bytes: int
    max_total_bytes: int
    read_timeout: float
    _buffered: int = field(default=0, init=False)

    async def read(self, request: Request) -> bytearray:
        """A JSON body, without a byte order mark that it may begin with.

        Raises ApiError: 413 for a body that is too large, 415 for another content type or a
        compressed body, 408 for a body that comes too slowly, 429 while other bodies take all the
        space.
        """
        kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise ApiError(415, f"content type {kind!r}; send application/json")
        encoding = request.headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity"):
            raise ApiError(
                415,
                f"content encoding {encoding[:60]!r}; send the body uncompressed",
                code="unsupported_content_encoding",
                headers={"Accept-Encoding": "identity"},
            )
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            await self._fill(body, request)
        except ClientDisconnect:
            raise ApiError(400, "the body ended early") from None
        except TimeoutError:
            raise self._too_slow() from None
        finally:
            self._buffered -= len(body)
        if body.startswith(BOM_UTF8):
            del body[: len(BOM_UTF8)]
        return body

    async def pieces(self, request: Request) -> AsyncIterator[bytes]:
        """The pieces of a body of any size, which nobody keeps here.

        Raises ApiError: 408 if it comes too slowly.
        """
        parts = aiter(request.stream())
        while True:
            try:
                async with asyncio.timeout(self.read_timeout):
                    part = await anext(parts, None)
            except ClientDisconnect:
                raise ApiError(400, "the body ended early") from None
            except TimeoutError:
                raise self._too_slow() from None
            if part is None:
                return
            yield part

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

    def _too_slow(self) -> ApiError:
        return ApiError(
            408,
            f"the body came too slowly: nothing for {self.read_timeout:g} s, or only "
            "a few bytes a second",
            headers={"Connection": "close"},
        )

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self.max_bytes} bytes; --max-body-bytes sets the limit",
            headers={"Connection": "close"},
        )

    def _no_room(self) -> ApiError:
        return ApiError(
            429,
            f"bodies of {self.max_total_bytes} bytes are being read already, as many as "
            "--max-bodies-bytes allows; retry later",
            code="too_many_bytes",
            headers={"Connection": "close"},
        )
