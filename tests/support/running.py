"""Running async tests without a plugin, on the event loop that the product uses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop


def run(coroutine: Coroutine[Any, Any, Any], timeout: float = 60.0) -> Any:
    """Run to the end on a uvloop; a test that hangs fails after `timeout` seconds."""

    async def bounded() -> Any:
        async with asyncio.timeout(timeout):
            return await coroutine

    return uvloop.run(bounded())


async def eventually(condition: Callable[[], Any], timeout: float = 10.0) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)
