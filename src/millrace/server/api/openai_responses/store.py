"""Responses that are kept for later requests: in memory, bounded, and only for their owner.

A conversation goes on behind a stored response (`previous_response_id`), so each one has all items
before it. Items are kept as JSON and shared between the responses of a conversation; each response
counts all of its bytes, so the bound holds whatever is shared. Over the bound the response that was
used the longest ago is dropped. How a response is made is not known here.
"""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from uuid import uuid4

import msgspec

from millrace.common.api_errors import ApiError
from millrace.errors import RequestError
from millrace.response_ids import TAG_DIGITS
from millrace.server.api.openai_responses.background import BackgroundRun
from millrace.server.api.openai_responses.items import Item
from millrace.server.api.openai_responses.response_body import RUNNING, ResponseBody, Status

logger = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode
_OVERHEAD = 1024  # bytes of a stored response beside its JSON


class StoredResponse:
    """One response. owner: who may use it. input: all items before its output, the conversation's
    before it among them. run: what makes it, or has made it, in the background.
    """

    def __init__(
        self,
        owner: str,
        input: Sequence[bytes],
        body: ResponseBody,
        run: BackgroundRun | None = None,
    ) -> None:
        self.id = body.id
        self.owner = owner
        self.input = tuple(input)
        self.run = run
        self.output: tuple[bytes, ...] = ()
        self._input_size = sum(map(len, self.input)) + _OVERHEAD
        self.settle(body)

    def settle(self, body: ResponseBody) -> None:
        """The answer has ended, or has begun."""
        self.status: Status = body.status
        self.output = tuple(_encode(item) for item in body.output)
        self._output_ids = [item["id"] for item in body.output]
        self._body = _encode(body)

    @property
    def running(self) -> bool:
        return self.status in RUNNING

    @property
    def body(self) -> bytes:
        """The answer as it is now, as JSON."""
        if self.run is not None and self.running:
            return _encode(self.run.snapshot())
        return self._body

    @property
    def size(self) -> int:
        """Bytes that it counts."""
        kept = sum(map(len, self.output)) + len(self._body) + self._input_size
        return kept + self.log_size

    @property
    def log_size(self) -> int:
        """Bytes of the events that are kept of its run."""
        return self.run.log_size if self.run is not None else 0

    def items(self) -> Iterator[Item]:
        """The conversation through this response."""
        for item in (*self.input, *self.output):
            yield msgspec.json.decode(item)

    def output_item(self, id: str) -> Item | None:
        """The item of its output with this id."""
        if id not in self._output_ids:
            return None
        found: Mapping[str, Any] = msgspec.json.decode(self.output[self._output_ids.index(id)])
        return found


class ResponseStore:
    """The responses of one server. max_responses, max_bytes: its bounds; 0 responses: none is kept.

    tag: stands in the id of each response and item, so that a gateway finds the server.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self.tag = secrets.token_hex(TAG_DIGITS // 2)
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def enabled(self) -> bool:
        return self._max_responses > 0

    def new_id(self) -> str:
        """The id of a new response."""
        return f"resp_{self.tag}{uuid4().hex}"

    def add(self, response: StoredResponse) -> None:
        """Keep a response. Raises ApiError (429) for one in the background where there is no room
        beside others that run; one that has ended is then not kept."""
        self._stored[response.id] = response
        self.resize(response)
        if response.running and response.id not in self._stored:
            raise ApiError(
                429,
                f"{self._max_responses} responses of {self._max_bytes} bytes are kept at most, and "
                "those that run in the background fill that; try again later",
                code="queue_full",
            )

    def resize(self, response: StoredResponse) -> None:
        """Count what a stored response needs now, and drop what is too much."""
        if response.id not in self._stored:
            return
        self._count(response)
        fits = response.size - response.log_size <= self._max_bytes
        while fits and self._overfull() and (oldest := self._oldest(but=response)) is not None:
            self._drop(oldest)
        if fits and self._overfull() and response.run is not None:
            response.run.shorten_log(self.bytes - self._max_bytes)
            self._count(response)
        if self._overfull():
            self._drop(response)
            logger.warning(
                "a response of %d bytes is not kept: --max-stored-bytes is %d",
                response.size, self._max_bytes,
            )  # fmt: skip

    def _count(self, response: StoredResponse) -> None:
        self.bytes += response.size - self._sizes.get(response.id, 0)
        self._sizes[response.id] = response.size

    def get(self, id: str, owner: str) -> StoredResponse:
        """A response of this owner. Raises ApiError (404)."""
        found = self._stored.get(id)
        if found is None or found.owner != owner:
            raise ApiError(404, f"Response with id {id[:100]!r} not found. {self._kept()}")
        self._stored.move_to_end(id)
        return found

    def previous(self, id: str, owner: str) -> StoredResponse:
        """A response that a new one goes on from. Raises RequestError."""
        found = self._stored.get(id)
        if found is None or found.owner != owner:
            raise RequestError(
                f"Previous response with id {id[:100]!r} not found. {self._kept()}",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        if found.status not in ("completed", "incomplete"):
            raise RequestError(
                f"the response {id} is {found.status}; only one that has ended can be continued",
                param="previous_response_id",
            )
        self._stored.move_to_end(id)
        return found

    def delete(self, id: str, owner: str) -> StoredResponse:
        """Forget a response. Raises ApiError (404)."""
        found = self.get(id, owner)
        self._drop(found)
        return found

    def output_item(self, id: str, owner: str) -> Item:
        """An item of the output of any response of this owner. Raises RequestError."""
        for response in reversed(self._stored.values()):
            if response.owner == owner and (found := response.output_item(id)) is not None:
                return found
        raise RequestError(f"Item with id {id[:100]!r} not found. {self._kept()}", param="input")

    def _kept(self) -> str:
        if not self.enabled:
            return "This server keeps none (--max-stored-responses 0); send the whole input."
        return (
            f"The server keeps the last {self._max_responses} in memory, up to {self._max_bytes} "
            "bytes, until it stops, each for the API key that made it; send the whole input."
        )

    def _overfull(self) -> bool:
        return len(self._stored) > self._max_responses or self.bytes > self._max_bytes

    def _oldest(self, but: StoredResponse) -> StoredResponse | None:
        """The one used the longest ago of those that have ended."""
        ended = (one for one in self._stored.values() if one is not but and not one.running)
        return next(ended, None)

    def _drop(self, response: StoredResponse) -> None:
        del self._stored[response.id]
        self.bytes -= self._sizes.pop(response.id, 0)
