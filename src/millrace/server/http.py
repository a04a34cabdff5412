"""What every endpoint needs of HTTP: bodies within bounds."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from millrace.server.errors import ApiError


async def read_body(request: Request, limit: int, pause: float = 30.0) -> bytes:
    """The JSON body. Raises ApiError: 413 above `limit` bytes, 415 for another content type, 408
    when nothing more comes for `pause` seconds.
    """
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"content type {kind!r}; send application/json")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    now = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(pause) as clock:
            async for part in request.stream():
                clock.reschedule(now() + pause)
                body += part
                if len(body) > limit:
                    raise _too_large(limit)
    except ClientDisconnect:
        raise ApiError(400, "the body ended early") from None
    except TimeoutError:
        raise ApiError(
            408,
            f"no more of the body came for {pause:g} s",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from None
    return bytes(body)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit} bytes; --max-body-bytes sets the limit",
        code="body_too_large",
        headers={"Connection": "close"},
    )
