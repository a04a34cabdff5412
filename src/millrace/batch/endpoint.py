"""Where a batch's requests are answered: a server of the OpenAI API, and what came back from it.

An answer is told apart by what to do next: keep it, send the request again, or stop asking the
server. When and where that happens is not decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from enum import Enum
from time import time
from typing import Protocol

import msgspec

from millrace.batch.lines import read_usage
from millrace.common.http_client import Connection, Target, connect, encode_request, error_text
from millrace.errors import one_line

CONNECT_SECONDS = 10.0
MOST_RETRY_AFTER = 300.0  # seconds that a server can ask us to wait
KEY_HEADER = "Idempotency-Key"
# What batch requests say of themselves, so that gateways and servers let streams go first.
CLASS_HEADERS = (("X-Service-Class", "batch"),)


class Verdict(Enum):
    """What an answer means for its request and its endpoint."""

    KEEP = "the answer is the result"
    REFUSED = "the request is at fault, and its error is the result"
    BUSY = "the endpoint asks to wait; the request is not at fault"
    AWAY = "the endpoint did not get the request"
    FAILED = "the endpoint failed on the request; either may be at fault"
    SHUT = "the endpoint will serve no request: keys or models are wrong"


class Answer(msgspec.Struct, frozen=True):
    """What came back. status: 0 if nothing whole did, and error says why. reached: the request was
    sent. retry_after: seconds that the server asks to wait."""

    status: int = 0
    body: bytes = b""
    request_id: str = ""
    error: str = ""
    reached: bool = True
    retry_after: float | None = None

    @property
    def verdict(self) -> Verdict:
        status = self.status
        if not status:
            return Verdict.FAILED if self.reached else Verdict.AWAY
        if 200 <= status < 300:
            return Verdict.KEEP if read_usage(self.body) is not None else Verdict.FAILED
        if status in (401, 403) or (status == 404 and not self._names_an_item):
            return Verdict.SHUT
        if status in (425, 429, 503):
            return Verdict.BUSY
        return Verdict.FAILED if status >= 500 or status in (408, 409) else Verdict.REFUSED

    @property
    def _names_an_item(self) -> bool:
        return b"previous_response" in self.body or b"Item with id" in self.body

    @property
    def reason(self) -> str:
        """One line on a bad answer."""
        if self.error:
            return self.error
        return f"status {self.status}: {error_text(self.body)}"


class Endpoint(Protocol):
    """A server. name: for messages."""

    name: str

    async def send(self, path: str, body: bytes, key: str, timeout: float) -> Answer:
        """Answer a request. key: of its idempotency. timeout: seconds. Does not raise."""

    async def close(self) -> None:
        """Drop all connections."""


class HttpEndpoint:
    """A server that is reached over HTTP. headers: sent with each request."""

    def __init__(self, target: Target, headers: Sequence[tuple[str, str]] = ()) -> None:
        self.name = str(target)
        self._target = target
        self._headers = (*headers, *CLASS_HEADERS)
        self._idle: list[Connection] = []

    async def send(self, path: str, body: bytes, key: str, timeout: float) -> Answer:
        """As `Endpoint.send`."""
        request = encode_request(
            self._target, "POST", path, body, (*self._headers, (KEY_HEADER, key))
        )
        answer = Answer(error=f"no answer within {timeout:g} s")
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                answer = await self._send(request)
        return answer

    async def _send(self, request: bytes) -> Answer:
        while (connection := self._take()) is not None:
            answer = await self._ask(connection, request)
            if answer is not None:
                return answer  # else the server had closed it while it was idle
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                connection = await connect(self._target)
        except TimeoutError:
            return Answer(error=f"no connection within {CONNECT_SECONDS:g} s", reached=False)
        except OSError as error:
            return Answer(error=f"cannot connect: {one_line(error)}", reached=False)
        return await self._ask(connection, request) or Answer(
            error="the server closed the connection without an answer"
        )

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        return None

    async def _ask(self, connection: Connection, request: bytes) -> Answer | None:
        """The answer; None if the connection ended without a byte of one."""
        try:
            response = await connection.send(request)
        except BaseException:
            connection.close()
            raise
        if response.error is not None:
            connection.close()
            return Answer(error=response.error) if response.status else None
        if connection.open:
            self._idle.append(connection)
        headers = response.headers
        return Answer(
            response.status,
            response.body,
            headers.get("x-request-id", ""),
            retry_after=seconds_to_wait(headers.get("retry-after", "")),
        )

    async def close(self) -> None:
        """As `Endpoint.close`."""
        while self._idle:
            self._idle.pop().close()


def seconds_to_wait(retry_after: str) -> float | None:
    """The seconds of a Retry-After header, a number or a date; None if it says nothing."""
    text = retry_after.strip()
    with suppress(ValueError, TypeError, OverflowError):
        seconds = float(text) if text[:1].isdigit() else _until(text)
        if seconds == seconds:
            return min(max(seconds, 0.0), MOST_RETRY_AFTER)
    return None


def _until(date: str) -> float:
    return parsedate_to_datetime(date).timestamp() - time()
