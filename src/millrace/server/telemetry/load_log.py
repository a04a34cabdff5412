"""One line of figures every ten seconds under load, for people who watch the log.

It reads the same totals as /metrics. An idle server writes nothing, but one line after its last
request, so that the log does not end with a busy one. Who waits between the lines is not known
here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from millrace.protocol import EngineStats
from millrace.server.telemetry.metrics import kv_usage

logger = logging.getLogger("millrace.load")

EVERY_SECONDS = 10.0


class LoadLog:
    """stats: gives the engine's latest figures. now: a clock in seconds."""

    def __init__(
        self, stats: Callable[[], EngineStats], now: Callable[[], float] = monotonic
    ) -> None:
        self._stats, self._now = stats, now
        self._last, self._at = stats(), now()
        self._was_busy = False

    def write(self) -> None:
        """Log the figures since the last call, if there was anything to do."""
        before, began = self._last, self._at
        stats, now = self._last, self._at = self._stats(), self._now()
        if stats.steps < before.steps:  # another engine: its totals begin at 0
            before = EngineStats()
        busy = stats.running + stats.waiting > 0 or stats.steps != before.steps
        if (busy or self._was_busy) and now > began:
            fields = figures(before, stats, now - began)
            logger.info("%s", as_text(fields), extra={"fields": fields})
        self._was_busy = busy


def figures(before: EngineStats, after: EngineStats, seconds: float) -> dict[str, float]:
    """Rates and shares between two moments, and what is there now. Shares are of 1."""
    queries = after.prefix_queries - before.prefix_queries
    drafts = after.drafts - before.drafts
    found: dict[str, float] = {
        "prompt_tokens_per_second": _rate(before.prefilled_tokens, after.prefilled_tokens, seconds),
        "generation_tokens_per_second": _rate(
            before.generated_tokens, after.generated_tokens, seconds
        ),
        "requests_running": after.running,
        "requests_waiting": after.waiting,
        "kv_cache_usage": round(kv_usage(after), 4),
    }
    if queries > 0:
        hits = after.prefix_hits - before.prefix_hits
        found["prefix_cache_hit_rate"] = round(hits / queries, 4)
    if drafts > 0:
        accepted = sum(after.accepted_per_position) - sum(before.accepted_per_position)
        tokens = after.draft_tokens - before.draft_tokens
        found["acceptance_length"] = round(1 + accepted / drafts, 3)
        found["draft_acceptance_rate"] = round(accepted / tokens, 4) if tokens else 0.0
    return found


def _rate(before: int, after: int, seconds: float) -> float:
    return round((after - before) / seconds, 1)


def as_text(fields: dict[str, float]) -> str:
    """The figures as a line for people."""
    line = (
        f"{fields['prompt_tokens_per_second']:,.0f} tok/s in, "
        f"{fields['generation_tokens_per_second']:,.0f} tok/s out; "
        f"{fields['requests_running']:.0f} running, {fields['requests_waiting']:.0f} waiting; "
        f"KV {fields['kv_cache_usage']:.0%}"
    )
    if "prefix_cache_hit_rate" in fields:
        line += f"; prefix hits {fields['prefix_cache_hit_rate']:.0%}"
    if "acceptance_length" in fields:
        line += (
            f"; acceptance length {fields['acceptance_length']:.2f}, "
            f"{fields['draft_acceptance_rate']:.0%} of drafts"
        )
    return line
