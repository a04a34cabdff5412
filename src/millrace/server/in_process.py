"""The API of an engine without a server: requests are calls, and nothing listens.

The engine is a process of its own, as under a server, and is started again when it dies. Who calls,
and why, is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

import msgspec
from starlette.types import ASGIApp, Message

from millrace.common.tasks import reported
from millrace.config import EngineArgs
from millrace.model_lookup import find_model
from millrace.protocol import Ready
from millrace.server.engine_link.client import EngineClient
from millrace.server.engine_link.control import EngineControl
from millrace.server.engine_link.process import ENGINE_PROGRAM
from millrace.server.engine_link.restarter import Restarter
from millrace.server.http.access import Access
from millrace.server.http.middleware import Middleware
from millrace.server.options import ServerOptions
from millrace.server.run import make_application, make_sandboxes
from millrace.server.telemetry.metrics import MetricsPage, RequestMetrics

logger = logging.getLogger(__name__)

_RESTARTS = 3  # of the engine, in a row


class Reply(msgspec.Struct, frozen=True):
    """A whole answer. headers: their names in lower case."""

    status: int
    body: bytes
    headers: dict[str, str]


class InProcessApi:
    """The API of one engine that is ready. limit: requests that may be open at a time."""

    def __init__(self, app: ASGIApp, client: EngineClient, ready: Ready, max_queue: int) -> None:
        self._app = app
        self._client = client
        self.limit = ready.max_num_seqs + max_queue
        self.summary = ready.summary

    async def post(self, path: str, body: bytes, headers: Sequence[tuple[str, str]]) -> Reply:
        """The answer to a request. Its end comes with a cancellation too."""
        given = [("content-type", "application/json"), *headers]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
            "root_path": "", "client": None, "server": None, "state": {},
            "headers": [(k.lower().encode(), v.encode()) for k, v in given],
        }  # fmt: skip
        exchange = _Exchange(body)
        await self._app(scope, exchange.receive, exchange.send)
        return exchange.reply()


class _Exchange:
    """One request and what is sent for it."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._start: Message = {"status": 500, "headers": []}
        self._pieces: list[bytes] = []

    async def receive(self) -> Message:
        if self._body is None:
            await asyncio.Event().wait()  # the caller does not go away: it cancels
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        else:
            self._pieces.append(message.get("body", b""))

    def reply(self) -> Reply:
        pairs = ((k.decode("latin-1"), v.decode("latin-1")) for k, v in self._start["headers"])
        headers = {name.lower(): value for name, value in pairs}
        return Reply(self._start["status"], b"".join(self._pieces), headers)


@contextlib.asynccontextmanager
async def running_api(
    args: EngineArgs, names: list[str], program: Sequence[str] = ENGINE_PROGRAM
) -> AsyncIterator[InProcessApi]:
    """The API of an engine, once that is ready. names: what requests may call the model.

    Raises UserError for options or a model that cannot work, EngineDeadError for an engine that
    dies while it loads.
    """
    directory = find_model(args.model, args.revision, args.download_dir)
    args = msgspec.structs.replace(args, model=str(directory))
    metrics = RequestMetrics()
    client = EngineClient(metrics)
    sandboxes = make_sandboxes(args)
    page = MetricsPage(names[0], metrics, lambda: client.stats, dict)
    app = make_application(
        args, ServerOptions(), names, client, metrics, page, sandboxes, EngineControl(client)
    )
    await client.start(args, program)
    supervision: asyncio.Task[None] | None = None
    try:
        ready = await client.wait_ready()
        sandboxes[0].start()
        supervision = reported("the supervision of the engine", _restart(client), logger.error)
        through = Middleware(app, metrics, Access(), unlogged_paths=None)
        yield InProcessApi(through, client, ready, args.max_queue)
    finally:
        if supervision is not None:
            supervision.cancel()
        await asyncio.gather(*(sandbox.close() for sandbox in sandboxes))
        await client.stop()


async def _restart(client: EngineClient) -> None:
    death = await Restarter(client, _RESTARTS).run()
    logger.error("the engine has died for good: %s", death)
