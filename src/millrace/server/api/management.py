"""The endpoints for whoever runs the server: pause, resume, sleep, wake up, forget what is cached.

Paths, query parameters and answers are vLLM's. Who may ask is decided before (`http.access`); how
an engine pauses and sleeps is known in `engine_link.control`.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from millrace.common.api_errors import ApiError
from millrace.errors import RequestError, UserError
from millrace.server.api.context import ApiContext
from millrace.server.api.transport import json_response
from millrace.server.engine_link.client import EngineDeadError
from millrace.server.engine_link.control import WAKE_TAGS, PauseMode, StillBusyError

_MODES: tuple[PauseMode, ...] = get_args(PauseMode)
_TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class Done(msgspec.Struct, frozen=True):
    """Answer of /reset_prefix_cache."""

    success: bool


class PauseState(msgspec.Struct, frozen=True):
    """Answer of /pause and /resume."""

    status: Literal["paused", "resumed"]


class IsPaused(msgspec.Struct, frozen=True):
    """Answer of /is_paused."""

    is_paused: bool


class SleepState(msgspec.Struct, frozen=True):
    """Answer of /sleep."""

    status: Literal["sleeping"]
    level: int


class WakeState(msgspec.Struct, frozen=True):
    """Answer of /wake_up. tags: those that were asked for; None: all."""

    status: Literal["awake", "sleeping"]
    tags: list[str] | None


class IsSleeping(msgspec.Struct, frozen=True):
    """Answer of /is_sleeping."""

    is_sleeping: bool


class Management:
    """The endpoints that change what the engine does."""

    def __init__(self, context: ApiContext) -> None:
        self._client = context.client
        self._control = context.control

    async def reset_prefix_cache(self, _: Request) -> Response:
        """POST /reset_prefix_cache: running requests keep what they use."""
        self._client.reset_prefix_cache()
        return json_response(Done(True))

    async def pause(self, request: Request) -> Response:
        """POST /pause?mode=abort|wait|keep&clear_cache=true"""
        mode, clear = _mode(request), _truth(request, "clear_cache", True)
        try:
            await self._control.pause(mode, clear_cache=clear)
        except StillBusyError as error:
            raise ApiError(503, str(error), code="still_busy") from None
        return json_response(PauseState("paused"))

    async def resume(self, _: Request) -> Response:
        """POST /resume"""
        await self._control.resume()
        return json_response(PauseState("resumed"))

    async def is_paused(self, _: Request) -> Response:
        """GET /is_paused"""
        return json_response(IsPaused(self._control.paused))

    async def sleep(self, request: Request) -> Response:
        """POST /sleep?level=0|1|2&mode=abort|wait"""
        given = request.query_params.get("level", "1")
        if given not in ("0", "1", "2"):
            raise RequestError(f"level must be 0, 1 or 2, got {given!r}", param="query.level")
        level, mode = int(given), _mode(request)
        if mode == "keep" and level:
            raise RequestError(
                "mode keep: what requests have computed is freed by sleep; use abort or wait, or "
                "POST /pause?mode=keep",
                param="query.mode",
            )
        try:
            await self._control.sleep(level, mode)
        except StillBusyError as error:
            raise ApiError(503, str(error), code="still_busy") from None
        return json_response(SleepState("sleeping", level))

    async def wake_up(self, request: Request) -> Response:
        """POST /wake_up?tags=weights&tags=kv_cache"""
        tags = request.query_params.getlist("tags")
        unknown = [tag for tag in tags if tag not in WAKE_TAGS]
        if unknown:
            known = " and ".join(WAKE_TAGS)
            message = f"tags: {unknown[0]!r} is not known; {known} are"
            raise RequestError(message, param="query.tags")
        try:
            awake = await self._control.wake(tags or None)
        except UserError as error:
            raise EngineDeadError(str(error)) from None
        return json_response(WakeState("awake" if awake else "sleeping", tags or None))

    async def is_sleeping(self, _: Request) -> Response:
        """GET /is_sleeping"""
        return json_response(IsSleeping(self._control.sleep_level is not None))


def _mode(request: Request) -> PauseMode:
    mode = request.query_params.get("mode", "abort")
    if mode not in _MODES:
        raise RequestError(
            f"mode must be one of {', '.join(_MODES)}, got {mode!r}", param="query.mode"
        )
    return mode


def _truth(request: Request, name: str, default: bool) -> bool:
    given = request.query_params.get(name)
    if given is None:
        return default
    if (known := _TRUTHS.get(given.lower())) is None:
        raise RequestError(f"{name} must be true or false, got {given!r}", param=f"query.{name}")
    return known
