"""The chat's HTTP client: one streamed answer at a time, over the OpenAI API.

Reads block, so that a Ctrl-C ends them at once; closing the connection ends the answer in the
server. Any server with /v1/chat/completions works. Draft acceptance is read from its /metrics,
under the names of Millrace or vLLM, where there is any.
"""

from __future__ import annotations

import http.client
import re
import ssl
from collections.abc import Generator, Sequence
from typing import Any

import msgspec

from millrace.common.http_client import error_text, parse_base_url
from millrace.errors import UserError

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 600.0  # without a byte


class Delta(msgspec.Struct, frozen=True):
    """New text of a chunk. reasoning: text before the answer. tokens: output so far, if known."""

    reasoning: str = ""
    content: str = ""
    tokens: int | None = None
    finish_reason: str | None = None


class DraftCounters(msgspec.Struct, frozen=True):
    """Totals of a server: drafts verified, tokens in them, and how many of those were accepted."""

    drafts: float
    draft_tokens: float
    accepted_tokens: float

    def since(self, earlier: DraftCounters) -> DraftCounters:
        """What was added after `earlier`."""
        return DraftCounters(
            self.drafts - earlier.drafts,
            self.draft_tokens - earlier.draft_tokens,
            self.accepted_tokens - earlier.accepted_tokens,
        )


class Client:
    """A server's API. base_url: with or without /v1 at its end."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        self.target = parse_base_url(base_url)
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def models(self) -> list[str]:
        """The model names of the server. Raises UserError."""
        answer = self._get("/v1/models")
        try:
            listed = msgspec.json.decode(answer)["data"]
            return [str(one["id"]) for one in listed]
        except (msgspec.DecodeError, KeyError, TypeError):
            raise UserError(f"{self.target}: /v1/models is no list of models") from None

    def draft_counters(self) -> DraftCounters | None:
        """The server's counters of drafts; None where it has none."""
        try:
            page = self._get("/metrics").decode("utf-8", "replace")
        except UserError:
            return None
        totals = [
            _total(page, f"spec_decode_num_{name}_total")
            for name in ("drafts", "draft_tokens", "accepted_tokens")
        ]
        drafts, draft_tokens, accepted_tokens = totals
        if drafts is None or draft_tokens is None or accepted_tokens is None:
            return None
        return DraftCounters(drafts, draft_tokens, accepted_tokens)

    def answer(
        self, model: str, messages: Sequence[dict[str, str]], options: dict[str, Any]
    ) -> Generator[Delta]:
        """Stream one answer. Closing the iterator ends it in the server. Raises UserError."""
        body = {
            "model": model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            **options,
        }
        connection = self._connect()
        try:
            response = self._send(connection, "POST", "/v1/chat/completions", body)
            for line in response:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    yield _delta(line[len(b"data: ") :])
        except OSError as error:
            raise UserError(f"{self.target}: the answer broke off ({error})") from None
        finally:
            connection.close()

    def _get(self, path: str) -> bytes:
        connection = self._connect()
        try:
            return self._send(connection, "GET", path).read()
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self.target.host, self.target.port
        if self.target.tls:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=context)
        return http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Any = None,
    ) -> http.client.HTTPResponse:
        """The response, its body unread. Raises UserError unless it is a success."""
        data = None if body is None else msgspec.json.encode(body)
        try:
            connection.connect()
            connection.sock.settimeout(ANSWER_SECONDS)
            connection.request(method, self.target.prefix + path, data, self._headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"no answer from {self.target} ({error})") from None
        if response.status != 200:
            text = error_text(response.read())
            raise UserError(f"{self.target} answers {response.status}: {text}")
        return response


def _total(page: str, name: str) -> float | None:
    for prefix in ("millrace:", "vllm:"):
        rows = re.findall(rf"^{prefix}{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
        if rows:
            return sum(map(float, rows))
    return None


def _delta(data: bytes) -> Delta:
    """The delta of one event. Raises UserError for an error of the server."""
    try:
        event = msgspec.json.decode(data)
    except msgspec.DecodeError:
        raise UserError(f"the server sent an event that is not JSON: {data[:80]!r}") from None
    if "error" in event:
        raise UserError(error_text(data))
    usage = event.get("usage") or {}
    choice: dict[str, Any] = next(iter(event.get("choices") or []), {})
    delta = choice.get("delta") or {}
    return Delta(
        reasoning=delta.get("reasoning_content") or delta.get("reasoning") or "",
        content=delta.get("content") or "",
        tokens=usage.get("completion_tokens"),
        finish_reason=choice.get("finish_reason"),
    )
