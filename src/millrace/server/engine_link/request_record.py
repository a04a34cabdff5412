"""What is recorded of one HTTP request while it is answered: for the log, metrics and traces.

The middleware makes a record for each request and sets it as `current` in the request's task; the
engine client adds the streams that are opened there. So endpoints need not pass it around.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from time import monotonic
from typing import TYPE_CHECKING

from starlette.types import Scope

from millrace.common.api_errors import shortened

if TYPE_CHECKING:
    from millrace.server.engine_link.stream import Stream

LOGGED_PATH = 256  # characters of a path that are logged
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that was gone before its answer

current: ContextVar[RequestRecord | None] = ContextVar("current", default=None)


class RequestRecord:
    """One HTTP request. started: monotonic seconds. started_unix: seconds since 1970."""

    __slots__ = ("id", "scope", "started", "started_unix", "status", "streams")

    def __init__(self, scope: Scope, request_id: str) -> None:
        self.id = request_id
        self.scope = scope
        self.started = monotonic()
        self.started_unix = time.time()
        self.status = CLIENT_CLOSED_REQUEST
        self.streams: list[Stream] = []

    @property
    def path(self) -> str:
        """As the client wrote it, without the query: printable ASCII of a bounded length."""
        raw: bytes = self.scope.get("raw_path") or b"/"
        return shortened(raw.decode("latin-1"), LOGGED_PATH)

    @property
    def route(self) -> str:
        """The path's pattern, of which there are few; `other` where none matched."""
        route = self.scope.get("route")
        return getattr(route, "path", "other")

    @property
    def background(self) -> bool:
        """Whether it is batch work, by its X-Service-Class."""
        return any(
            name == b"x-service-class" and value.strip().lower() == b"batch"
            for name, value in self.scope["headers"]
        )

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts. Of several outputs for one prompt, the first counts it."""
        return sum(stream.prompt_len for stream in self.streams if stream.counts_prompt)

    @property
    def cached_tokens(self) -> int:
        return sum(stream.cached_tokens for stream in self.streams if stream.counts_prompt)

    @property
    def known_tokens(self) -> int:
        """Tokens that earlier prompts began with too, cached or not."""
        prompts = [stream for stream in self.streams if stream.counts_prompt]
        return sum(stream.cache.known for stream in prompts if stream.cache is not None)

    @property
    def completion_tokens(self) -> int:
        return sum(stream.generated_tokens for stream in self.streams)
