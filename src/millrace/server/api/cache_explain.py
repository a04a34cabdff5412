"""GET /cache/explain: why a prompt was not found in the prefix cache, or not all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from millrace.common.api_errors import ApiError
from millrace.common.prefix_hash import SALT_HEADER
from millrace.protocol import CacheReport
from millrace.response_ids import OWNER_HEADER
from millrace.server.api.context import ApiContext
from millrace.server.api.transport import json_response
from millrace.server.engine_link.request_record import RequestRecord
from millrace.server.http.access import client_of
from millrace.server.telemetry.cache_reports import CacheReports

# The first token of a range, and the one behind its last. A list: the schema of a tuple is not
# valid in OpenAPI.
TokenRange = Annotated[list[int], msgspec.Meta(min_length=2, max_length=2)]


class Explanation(msgspec.Struct, frozen=True):
    """known_tokens: of the prompt, those that an earlier prompt began with too. before, prompt,
    other: texts before that place, behind it, and behind it in the nearest other prompt; other is
    null where the cache is shared by several keys."""

    prompt_tokens: int
    cached_tokens: int
    known_tokens: int
    evicted_tokens: int
    tiers: dict[str, TokenRange]
    reason: str
    before: str
    prompt: str
    other: str | None


class CachedRequest(msgspec.Struct, frozen=True):
    """conversation: the same for prompts that begin with the same system prompt and message."""

    id: str
    conversation: str
    prompt_tokens: int
    cached_tokens: int
    known_tokens: int
    tiers: dict[str, TokenRange]


class CachedRequests(msgspec.Struct, frozen=True):
    """The latest requests of a key, newest first."""

    requests: list[CachedRequest]


class CacheExplain:
    """The endpoint of one replica."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def explain(self, request: Request) -> Response:
        """GET /cache/explain?request_id=ID, with the key that sent that request; without an ID the
        figures of that key's latest requests."""
        client, name = client_of(request.scope), request.query_params.get("request_id", "")
        if not name:
            return json_response(self._latest(_owner(request.scope)))
        found = self._context.client.cache_reports.find(name, _owner(request.scope))
        if found is None:
            raise ApiError(
                404,
                f"request_id {name!r}: none of the latest requests of this key; use the id of an "
                "answer, or its header x-request-id",
                param="request_id",
            )
        tokens, report = found
        salted = client.salt or request.headers.get(SALT_HEADER)
        alone = bool(salted) or not (client.owner or request.headers.get(OWNER_HEADER))
        return json_response(
            Explanation(
                tokens,
                report.cached,
                report.known,
                report.evicted,
                _ranges(report.loaded),
                reason(report, tokens),
                self._text(report.before),
                self._text(report.prompt),
                self._text(report.other) if alone else None,
            )
        )

    def _latest(self, owner: str) -> CachedRequests:
        listed = self._context.client.cache_reports.latest(owner)
        return CachedRequests(
            [
                CachedRequest(
                    name, conversation, tokens, one.cached, one.known, _ranges(one.loaded)
                )
                for name, tokens, one, conversation in listed
            ]
        )

    def _text(self, tokens: list[int]) -> str:
        return self._context.processor.tokenizer.decode(tokens, False)


def _ranges(loaded: Mapping[str, tuple[int, int]]) -> dict[str, TokenRange]:
    return {tier: list(range_) for tier, range_ in loaded.items()}


def _owner(scope: Scope) -> str:
    """Whose request it is: of its API key, and of whom its gateway names."""
    return f"{client_of(scope).owner}.{Headers(scope=scope).get(OWNER_HEADER, '')}"


def keep_report(reports: CacheReports, record: RequestRecord) -> None:
    """Keep what the prefix cache had of an ended request, by its ids; of several prompts, the whole
    request's ids name the first."""
    owner = _owner(record.scope)
    for stream in reversed(record.streams):
        if stream.cache is None:
            continue
        whole, _, number = stream.id.rpartition("-")  # of a completion, numbered by prompt
        names = [stream.id, record.id, *([whole] if number.isdigit() and whole else [])]
        for name in dict.fromkeys(names):
            reports.add(name, owner, stream.prompt_len, stream.cache, stream.conversation)


def reason(report: CacheReport, tokens: int) -> str:
    """In one sentence, why no more of a prompt of so many tokens was found."""
    if report.cached >= report.known and report.cached >= tokens - 1:
        return "all of the prompt was cached"
    if report.evicted:
        return f"a snapshot at token {report.evicted} was evicted, and no lower tier had it"
    if report.known > report.cached:
        return (
            f"the prompt is known up to token {report.known}, but the nearest snapshot before that "
            f"is at token {report.cached}"
        )
    return f"from token {report.known} on, no earlier prompt is the same"
