"""Questions to a replica: whether it is healthy, which models it serves, and one token.

The health monitor decides what follows from an answer and when to ask again. The load counters are
not touched.
"""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec

from millrace.common.http_client import Response, Target, error_text, fetch
from millrace.gateway.common.replica_spec import Records, Role
from millrace.gateway.http.request_info import Kind

# Several tokens: prompts of one token take a code path that fails in some engines.
_PROBE = {"prompt": "One, two, three, four, five,", "max_tokens": 1, "temperature": 0}


class _Health(msgspec.Struct):
    response_tag: str = ""
    role: Role = ""
    records: Records | None = None


_read_health = msgspec.json.Decoder(_Health).decode


class Problem(msgspec.Struct, frozen=True):
    """Why a replica is not healthy. lost: it cannot be reached; its running requests will not
    end."""

    text: str
    lost: bool = False


UNCERTAIN = Problem("no answer")  # once, which is not yet evidence


# Probes are no requests of anybody: the last digit says that their trace is not kept.
_MARKS = (("X-Millrace-Probe", "1"), ("traceparent", f"00-{'1' * 32}-{'1' * 16}-00"))


class ServedModels(msgspec.Struct, frozen=True):
    """The models of a replica. cards: as in /v1/models."""

    cards: list[dict[str, Any]]
    names: tuple[str, ...]
    kind: Kind


class HealthProbe:
    """Questions to one replica. headers: sent with each. timeout, probe_timeout: seconds for an
    answer, and for a completion. misses: checks in a row without an answer that are evidence.
    response_tag: what the ids of its stored responses hold, role: of the replica, and records:
    where it hands over those of its prompts, as it last said.
    """

    def __init__(
        self,
        target: Target,
        headers: tuple[tuple[str, str], ...],
        *,
        timeout: float,
        probe_timeout: float,
        misses: int,
    ) -> None:
        self._target = target
        self._headers = (*headers, *_MARKS)
        self._timeout = timeout
        self._probe_timeout = probe_timeout
        self._misses = misses
        self._missed = 0
        self.response_tag = ""
        self.role: Role = ""
        self.records: Records | None = None

    async def check_health(self) -> Problem | None:
        """What is wrong by GET /health; None if nothing is, UNCERTAIN if it is not known yet."""
        try:
            response = await self._fetch("/health")
        except TimeoutError:
            self._missed += 1
            if self._missed < self._misses:
                return UNCERTAIN
            return Problem(f"no answer to {self._missed} health checks in a row", lost=True)
        except ConnectionRefusedError as error:
            return Problem(f"health check failed, connection refused ({error})", lost=True)
        except OSError as error:
            return Problem(f"health check failed ({error})")
        self._missed = 0
        if response.status != 200:
            return Problem(f"/health says {response.status} ({error_text(response.body)})")
        said = _Health()
        with contextlib.suppress(msgspec.DecodeError):
            said = _read_health(response.body)
        self.response_tag, self.role, self.records = said.response_tag, said.role, said.records
        return None

    async def read_models(self) -> ServedModels | None:
        """Which models it serves, and which kind of server it is; None if it does not say."""
        with contextlib.suppress(OSError, msgspec.DecodeError, TypeError, KeyError, AttributeError):
            response = await self._fetch("/v1/models")
            if response.status != 200:
                return None
            cards = msgspec.json.decode(response.body)["data"]
            names = tuple(str(card["id"]) for card in cards)
            owners = {card.get("owned_by") for card in cards}
            kind: Kind = "other"
            if "millrace" in owners:
                kind = "millrace"
            elif "vllm" in owners:
                kind = "vllm"
            return ServedModels(cards, names, kind)
        return None

    async def check_completion(self, model: str | None) -> Problem | None:
        """Have it complete one token, which /health does not prove. None if it did."""
        body = msgspec.json.encode({**({"model": model} if model else {}), **_PROBE})
        try:
            response = await self._fetch("/v1/completions", "POST", body, self._probe_timeout)
        except OSError as error:
            return Problem(f"a completion of one token failed ({error or 'no answer in time'})")
        if response.status >= 500 and response.status != 501:  # 501: it serves no completions
            text = error_text(response.body)
            return Problem(f"a completion of one token got {response.status} ({text})")
        return None

    async def _fetch(
        self, path: str, method: str = "GET", body: bytes = b"", timeout: float | None = None
    ) -> Response:
        return await fetch(
            self._target,
            path,
            method=method,
            body=body,
            headers=self._headers,
            timeout=self._timeout if timeout is None else timeout,
        )
