"""An engine of this command as the endpoint of a batch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from millrace.batch.endpoint import Answer, seconds_to_wait
from millrace.batch.journal import StopError
from millrace.config import EngineArgs
from millrace.errors import one_line
from millrace.server.engine_link.client import EngineDeadError
from millrace.server.in_process import InProcessApi, running_api


class EngineEndpoint:
    """Requests are answered by the engine behind `api`, without HTTP."""

    def __init__(self, name: str, api: InProcessApi) -> None:
        self.name = name
        self._api = api

    async def send(self, path: str, body: bytes, key: str, timeout: float) -> Answer:
        """As `Endpoint.send`. key: nothing that is sent here outlives this process."""
        try:
            async with asyncio.timeout(timeout):
                reply = await self._api.post(path, body, ())
        except TimeoutError:
            return Answer(error=f"no answer within {timeout:g} s")
        except Exception as error:
            return Answer(error=f"the request failed here: {one_line(error)}")
        wait = seconds_to_wait(reply.headers.get("retry-after", ""))
        request_id = reply.headers.get("x-request-id", "")
        return Answer(reply.status, reply.body, request_id, retry_after=wait)

    async def close(self) -> None:
        """As `Endpoint.close`."""


@contextlib.asynccontextmanager
async def engine_endpoint(args: EngineArgs) -> AsyncIterator[tuple[EngineEndpoint, int]]:
    """(an endpoint, requests that it may have in flight). Raises UserError, or StopError if the
    engine does not start."""
    try:
        async with running_api(args, [args.model]) as api:
            yield EngineEndpoint(args.model, api), api.limit
    except EngineDeadError as error:
        raise StopError(f"the engine did not start: {one_line(error)}") from None
