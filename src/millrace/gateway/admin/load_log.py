"""One line of figures every ten seconds under load, for people who watch a gateway's log.

It reads the shared counters, so it is the sum over all gateway processes and replicas. What the
replicas say of themselves is in their own lines.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import monotonic

from millrace.gateway.common.shared_counters import BYTES, PROMPT_TOKENS, SharedCounters
from millrace.gateway.routing.replicas import Member

logger = logging.getLogger("millrace.load")

EVERY_SECONDS = 10.0


class LoadLog:
    """members: gives the replicas. now: a clock in seconds."""

    def __init__(
        self,
        counters: SharedCounters,
        members: Callable[[], Sequence[Member]],
        now: Callable[[], float] = monotonic,
    ) -> None:
        self._counters, self._members, self._now = counters, members, now
        self._last, self._at = self._totals(), now()
        self._was_busy = False

    def _totals(self) -> tuple[int, int, int]:
        """Requests that were answered, their prompt tokens, bytes that were relayed."""
        slots = [member.slot for member in self._members()]
        rows = self._counters.replica_sums(max(slots, default=-1) + 1)
        tokens, sent = (sum(rows[slot][cell] for slot in slots) for cell in (PROMPT_TOKENS, BYTES))
        return self._counters.events()["relayed_requests"], tokens, sent

    def write(self) -> None:
        """Log the figures since the last call, if there was anything to do."""
        before, began = self._last, self._at
        totals, now = self._last, self._at = self._totals(), self._now()
        gauge = self._counters.gauge
        running = gauge("interactive") + gauge("batch")
        waiting = gauge("queued_interactive") + gauge("queued_batch") + gauge("held")
        busy = bool(running or waiting or totals != before)
        if (busy or self._was_busy) and now > began:
            # A replica that has gone takes its totals along.
            done, tokens, sent = (
                max(0.0, (b - a) / (now - began)) for a, b in zip(before, totals, strict=True)
            )
            states = [member.state for member in self._members()]
            logger.info(
                "%.1f requests/s, %s prompt tok/s (estimated), %.2f MB/s of answers; %d running, "
                "%d waiting; %d of %d replicas up",
                done, f"{tokens:,.0f}", sent / 1e6, running, waiting, states.count("up"),
                len(states),
                extra={"fields": {
                    "requests_per_second": round(done, 2), "requests_running": running,
                    "requests_waiting": waiting, "prompt_tokens_per_second": round(tokens, 1),
                    "replicas_up": states.count("up"), "replicas": len(states),
                }},
            )  # fmt: skip
        self._was_busy = busy
