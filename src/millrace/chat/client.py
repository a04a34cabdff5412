"""The chat's way to a server: one streamed answer at a time, over OpenAI's API.

Plain blocking HTTP, so that a Ctrl-C ends a read at once; dropping the connection ends the answer
in the server. Any server with /v1/chat/completions will do; acceptance of drafts is read from its
/metrics, under Millrace's or vLLM's names, where it has them.
"""

from __future__ import annotations

import http.client
import re
import ssl
from collections.abc import Generator, Sequence
from typing import Any

import msgspec

from millrace.common.http_client import Target, error_text, parse_url
from millrace.errors import UserError

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 600.0  # without a byte


class Piece(msgspec.Struct, frozen=True):
    """What a chunk brought. reasoning: text before the answer. tokens: so far, if it is said."""

    reasoning: str = ""
    content: str = ""
    tokens: int | None = None
    finish_reason: str | None = None


class Drafts(msgspec.Struct, frozen=True):
    """Running totals of a server: rows of drafts verified, drafts in them, and how many stood."""

    rows: float
    drafted: float
    accepted: float

    def since(self, earlier: Drafts) -> Drafts:
        return Drafts(
            self.rows - earlier.rows,
            self.drafted - earlier.drafted,
            self.accepted - earlier.accepted,
        )


class Client:
    """A server's API. base_url: with or without /v1 at its end."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        target = parse_url(base_url)
        prefix = target.prefix.removesuffix("/v1")
        self.target = Target(target.host, target.port, target.tls, prefix)
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def models(self) -> list[str]:
        """The names that the server has for its model. Raises UserError."""
        answer = self._ask("GET", "/v1/models")
        try:
            listed = msgspec.json.decode(answer)["data"]
            return [str(one["id"]) for one in listed]
        except (msgspec.DecodeError, KeyError, TypeError):
            raise UserError(f"{self.target}: /v1/models is no list of models") from None

    def drafts(self) -> Drafts | None:
        """What the server says of its drafts; None where it says nothing."""
        try:
            page = self._ask("GET", "/metrics").decode("utf-8", "replace")
        except UserError:
            return None
        totals = [
            _total(page, f"spec_decode_num_{name}_total")
            for name in ("drafts", "draft_tokens", "accepted_tokens")
        ]
        rows, drafted, accepted = totals
        if rows is None or drafted is None or accepted is None:
            return None
        return Drafts(rows, drafted, accepted)

    def answer(
        self, model: str, messages: Sequence[dict[str, str]], options: dict[str, Any]
    ) -> Generator[Piece]:
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
                    yield _piece(line[len(b"data: ") :])
        except OSError as error:
            raise UserError(f"{self.target}: the answer broke off ({error})") from None
        finally:
            connection.close()

    def _ask(self, method: str, path: str) -> bytes:
        connection = self._connect()
        try:
            return self._send(connection, method, path).read()
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


def _piece(data: bytes) -> Piece:
    """What one event says. Raises UserError if it says that the answer failed."""
    try:
        event = msgspec.json.decode(data)
    except msgspec.DecodeError:
        raise UserError(f"the server sent an event that is no JSON: {data[:80]!r}") from None
    if "error" in event:
        raise UserError(error_text(data))
    usage = event.get("usage") or {}
    choice: dict[str, Any] = next(iter(event.get("choices") or []), {})
    delta = choice.get("delta") or {}
    return Piece(
        reasoning=delta.get("reasoning_content") or delta.get("reasoning") or "",
        content=delta.get("content") or "",
        tokens=usage.get("completion_tokens"),
        finish_reason=choice.get("finish_reason"),
    )
