"""Requests with an Idempotency-Key header: a repeat gets the answer of the first one.

A client that lost its connection, or was killed, sends its request again under the same key. If the
first one still runs, the repeat waits for it; if it has ended, its answer is kept for a while. So
such a request goes on when its client is gone. Keys belong to their client; the same key with
another body is refused. Streams are neither kept nor joined. Answers that say "try again" are not
kept. What a request means is not known here.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import MutableMapping
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from millrace.common.api_errors import ApiError
from millrace.common.prefix_hash import PROMPT_FIELDS, SALT_HEADER
from millrace.common.tasks import reported
from millrace.server.http.access import client_of
from millrace.server.http.errors import error_response

logger = logging.getLogger(__name__)

HEADER = b"idempotency-key"
REPLAYED = (b"idempotent-replayed", b"true")
MAX_KEY = 256  # bytes
MAX_ANSWERS = 4096  # kept, or on their way
MAX_BYTES = 64 << 20  # of all kept answers
_TRY_AGAIN = frozenset({408, 409, 425, 429})
_BODY_SECONDS = 30.0  # for each further part of a repeat's body

_Key = tuple[str, bytes, str, bytes]


class IdempotentRequests:
    """An ASGI application around another one. max_answers, max_bytes: of the answers it keeps."""

    def __init__(
        self, app: ASGIApp, max_answers: int = MAX_ANSWERS, max_bytes: int = MAX_BYTES
    ) -> None:
        self._app = app
        self._max_answers = max_answers
        self._max_bytes = max_bytes
        self._runs: OrderedDict[_Key, _Run] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        """Answers that are kept, or on their way."""
        return len(self._runs)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = _key_of(scope)
        if key is None:
            await self._app(scope, receive, send)
        elif len(key[-1]) > MAX_KEY:
            error = ApiError(400, f"Idempotency-Key has more than {MAX_KEY} bytes")
            await _refuse(error, scope, receive, send)
        elif (run := self._runs.get(key)) is not None:
            await self._repeat(run, scope, receive, send)
        else:
            self._drop_oldest(len(self._runs) + 1 - self._max_answers)
            full = len(self._runs) >= self._max_answers
            answer = self._app if full else _First(self, key).answer
            await answer(scope, receive, send)

    def start(self, key: _Key, run: _Run, scope: Scope) -> asyncio.Task[None]:
        """Have a first request answered, and keep its answer if it is worth that."""
        self._runs[key] = run  # from now on others with the key are repeats
        return reported("a request with a key", self._run(key, run, scope), logger.error)

    async def _run(self, key: _Key, run: _Run, scope: Scope) -> None:
        try:
            await self._app(scope, run.receive, run.send)
        finally:
            run.ended.set()
            if run.worth_keeping:
                self._bytes += run.size
                self._runs.move_to_end(key)
                self._drop_oldest(0)
            else:
                del self._runs[key]

    def _drop_oldest(self, count: int) -> None:
        """Forget so many answers, those that ended the longest ago, and more to free bytes."""
        for key, run in list(self._runs.items()):
            if count <= 0 and self._bytes <= self._max_bytes:
                return
            if run.ended.is_set():
                del self._runs[key]
                self._bytes -= run.size
                count -= 1

    async def _repeat(self, run: _Run, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            digest = await _digest_of_body(receive)
        except (ConnectionError, TimeoutError):
            return
        if not await _unless_gone(run.ended, receive):
            return
        if run.streams or not run.start:
            error = ApiError(409, "the first request with this Idempotency-Key left no answer")
            await _refuse(error, scope, receive, send)
        elif digest != run.digest:
            error = ApiError(
                422,
                "this Idempotency-Key was used with another body; use a new key",
                code="idempotency_key_reused",
            )
            await _refuse(error, scope, receive, send)
        else:
            headers = [*run.start["headers"], REPLAYED]
            await send({**run.start, "headers": headers})
            await send({"type": "http.response.body", "body": b"".join(run.pieces)})


class _First:
    """The first request with a key, and its client."""

    def __init__(self, owner: IdempotentRequests, key: _Key) -> None:
        self._owner = owner
        self._key = key

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have it answered; return when that is done, or when the client has gone."""
        run = _Run(receive, send)
        running = self._owner.start(self._key, run, scope)
        if not await _unless_gone(run.ended, run.client_gone):
            run.leave()
            return
        await asyncio.wait([running])
        if run.start and not run.streams:
            await send(run.start)
            await send({"type": "http.response.body", "body": b"".join(run.pieces)})
        elif not run.start:
            await _refuse(ApiError(500, "the request failed here"), scope, receive, send)


class _Run:
    """A first request while it is answered, and its answer. digest: of its body."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self.ended = asyncio.Event()
        self.start: MutableMapping[str, Any] = {}
        self.pieces: list[bytes] = []
        self.size = 0
        self.streams = False
        self._hash = hashlib.sha256()
        self._whole_body = asyncio.Event()
        self._gone = asyncio.Event()  # and nobody is left
        self._left = False
        self._client_receive = receive
        self._client_send = send

    @property
    def digest(self) -> bytes:
        return self._hash.digest()

    @property
    def worth_keeping(self) -> bool:
        status = self.start.get("status", 500)
        whole = self._whole_body.is_set() and not self.streams
        return whole and status < 500 and status not in _TRY_AGAIN

    def leave(self) -> None:
        """The client has gone, and a stream has nobody then."""
        self._left = True
        if self.streams:
            self._gone.set()

    async def client_gone(self) -> Message:
        """As `receive`, for messages behind the body."""
        await self._whole_body.wait()
        return await self._client_receive()

    async def receive(self) -> Message:
        """What the application receives: the body, then nothing, unless nobody is left."""
        if self._whole_body.is_set():
            await self._gone.wait()
            return {"type": "http.disconnect"}
        message = await self._client_receive()
        if message["type"] == "http.request":
            self._hash.update(message.get("body", b""))
            if not message.get("more_body", False):
                self._whole_body.set()
        return message

    async def send(self, message: Message) -> None:
        """What the application sends: kept, but a stream is passed on."""
        if message["type"] == "http.response.start":
            kinds = [v for k, v in message.get("headers", ()) if k.lower() == b"content-type"]
            self.streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
            self.start = {"headers": [], **message}
            if self.streams and self._left:
                self._gone.set()
        if self.streams:
            await self._client_send(message)
        elif message["type"] == "http.response.body":
            self.pieces.append(message.get("body", b""))
            self.size += len(self.pieces[-1])


def _key_of(scope: Scope) -> _Key | None:
    """The key of a request for text, with its owner and path; None without one."""
    if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PROMPT_FIELDS:
        return None
    key = salt = b""
    for name, value in scope["headers"]:
        if name == HEADER:
            key = value
        elif name == SALT_HEADER.encode():
            salt = value
    return (client_of(scope).owner, salt, scope["path"], key) if key else None


async def _digest_of_body(receive: Receive) -> bytes:
    """The digest of a body. Raises ConnectionError if the client goes, or TimeoutError."""
    found = hashlib.sha256()
    while True:
        async with asyncio.timeout(_BODY_SECONDS):
            message = await receive()
        if message["type"] != "http.request":
            raise ConnectionError("the client has gone")
        found.update(message.get("body", b""))
        if not message.get("more_body", False):
            return found.digest()


async def _unless_gone(ended: asyncio.Event, receive: Receive) -> bool:
    """Wait for an event; False if the client goes before that is over."""
    waiting = asyncio.ensure_future(ended.wait())
    going = asyncio.ensure_future(receive())
    try:
        await asyncio.wait([waiting, going], return_when=asyncio.FIRST_COMPLETED)
        return waiting.done()
    finally:
        waiting.cancel()
        going.cancel()
        await asyncio.gather(waiting, going, return_exceptions=True)


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    answer = await error_response(Request(scope), error)
    await answer(scope, receive, send)
