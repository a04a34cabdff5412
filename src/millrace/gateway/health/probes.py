"""What a replica answers when it is asked whether it is well, what it serves, and for one token.

What follows from an answer, and when to ask again, is the keeper's business (keeper.py). None of it
touches the counters of load.
"""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec

from millrace.common.http_client import Response, Target, error_text, fetch
from millrace.gateway.http.request_info import Kind

# A few words: prompts of a single token take ways through some engines that fail.
_PROBE = {"prompt": "One, two, three, four, five,", "max_tokens": 1, "temperature": 0}


class Problem(msgspec.Struct, frozen=True):
    """Why a replica is not well. lost: nobody is there, so what it has under way will not end."""

    text: str
    lost: bool = False


DOUBT = Problem("no answer")  # and not for so long yet that it says something


class Offer(msgspec.Struct, frozen=True):
    """What a replica serves. cards: as /v1/models has them."""

    cards: list[dict[str, Any]]
    names: tuple[str, ...]
    kind: Kind


class HealthProbe:
    """Questions to one replica. headers: sent with each. timeout, probe_timeout: seconds for an
    answer, and for one that needs a step. misses: answers in a row that say something by missing.
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
        self._headers = (*headers, ("X-Millrace-Probe", "1"))
        self._timeout = timeout
        self._probe_timeout = probe_timeout
        self._misses = misses
        self._missed = 0

    async def problem(self) -> Problem | None:
        """What is wrong by its own word; None if it is well, DOUBT if that cannot be said yet."""
        try:
            response = await self._info("/health")
        except TimeoutError:
            self._missed += 1
            if self._missed < self._misses:
                return DOUBT
            return Problem(f"no answer to {self._missed} health checks in a row", lost=True)
        except ConnectionRefusedError as error:
            return Problem(f"health check failed, nobody listens there ({error})", lost=True)
        except OSError as error:
            return Problem(f"health check failed ({error})")
        self._missed = 0
        if response.status != 200:
            return Problem(f"/health says {response.status} ({error_text(response.body)})")
        return None

    async def offer(self) -> Offer | None:
        """Which models it serves, and what kind of server it is; None if it does not say."""
        with contextlib.suppress(OSError, msgspec.DecodeError, TypeError, KeyError, AttributeError):
            response = await self._info("/v1/models")
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
            return Offer(cards, names, kind)
        return None

    async def probe(self, model: str | None) -> Problem | None:
        """Have it complete one token: a green /health does not say that it can. None if it did."""
        body = msgspec.json.encode({**({"model": model} if model else {}), **_PROBE})
        try:
            response = await self._info("/v1/completions", "POST", body, self._probe_timeout)
        except OSError as error:
            return Problem(f"a completion of one token failed ({error or 'no answer in time'})")
        if response.status >= 500:
            text = error_text(response.body)
            return Problem(f"a completion of one token got {response.status} ({text})")
        return None

    async def _info(
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
