"""Whether servers that do not fail without a record have really handed prompts over.

vLLM's decode server computes a prompt again if nothing comes, and says nothing. So its counters are
read after hand-overs: one that answers prompts which another has computed must have taken bytes, or
have found tokens outside; and no record of the other's may have run out. A pair whose counters say
otherwise is reported, and gets no prompts for a while.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time

from millrace.common.http_client import Target, fetch
from millrace.gateway.common.shared_counters import ProcessCounters
from millrace.gateway.routing.replicas import Replica

logger = logging.getLogger(__name__)

READ_AFTER = 1.0  # seconds from a hand-over to a look at counters
LOOKS = 3  # before counters that stand still count
BROKEN_SECONDS = 60.0  # that a pair gets no prompts
_TIMEOUT = 5.0
# Bytes that came over NIXL, and prompt tokens found outside by any connector.
_TAKEN = re.compile(
    rb"^vllm:(?:nixl_bytes_transferred_sum|external_prefix_cache_hits_total)(?:\{[^}]*\})? (\S+)",
    re.MULTILINE,
)
_EXPIRED = re.compile(rb"^vllm:nixl_num_kv_expired_reqs_total(?:\{[^}]*\})? (\S+)", re.MULTILINE)
_Pair = tuple[int, int]  # ids of who computes and who answers


class PairChecks:
    """Of one gateway process. headers: sent with questions to replicas."""

    def __init__(
        self, process_counters: ProcessCounters, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self._counters, self._headers = process_counters, headers
        self._tasks: dict[_Pair, asyncio.Task[None]] = {}  # one at a time for a pair
        self._seen: dict[_Pair, tuple[float, float]] = {}  # what was taken, and what ran out
        self._broken: dict[_Pair, float] = {}  # until when

    def is_broken(self, prefiller: Replica, answerer: Replica) -> bool:
        """Whether the pair did not hand over what it said, lately."""
        until = self._broken.get((prefiller.member.id, answerer.member.id))
        return until is not None and until > time.monotonic()

    def handed_over(self, prefiller: Replica, answerer: Replica) -> None:
        """A prompt is said to have gone from one to the other: look at their counters soon."""
        pair = prefiller.member.id, answerer.member.id
        if pair not in self._tasks:
            task = asyncio.get_running_loop().create_task(
                self._check(pair, prefiller.target, answerer.target)
            )
            self._tasks[pair] = task
            task.add_done_callback(lambda _: self._tasks.pop(pair, None))

    def close(self) -> None:
        """End the looks that are under way."""
        for task in list(self._tasks.values()):
            task.cancel()

    async def _check(self, pair: _Pair, prefiller: Target, answerer: Target) -> None:
        taken, expired = self._seen.get(pair, (0.0, 0.0))
        for _ in range(LOOKS):
            await asyncio.sleep(READ_AFTER)
            try:
                now = await self._sum(_TAKEN, answerer), await self._sum(_EXPIRED, prefiller)
            except (OSError, ValueError) as error:
                logger.warning("hand-over %s to %s: no counters (%s)", prefiller, answerer, error)
                return
            ran_out = pair in self._seen and now[1] > expired
            if now[0] > taken and not ran_out:
                self._seen[pair] = now
                self._broken.pop(pair, None)
                return
        self._seen[pair] = now
        self._broken[pair] = time.monotonic() + BROKEN_SECONDS
        self._counters.count_event("hand_over_unproven")
        logger.error(
            "hand-over from %s to %s: nothing moved (%s took %g before and after, and %g records "
            "of %s ran out); the pair gets no prompts for %g s",
            prefiller, answerer, answerer, now[0], now[1], prefiller, BROKEN_SECONDS,
        )  # fmt: skip

    async def _sum(self, pattern: re.Pattern[bytes], target: Target) -> float:
        """The sum of the figures that a replica's metrics have by these names."""
        page = await fetch(target, "/metrics", headers=self._headers, timeout=_TIMEOUT)
        if page.status != 200:
            raise ValueError(f"/metrics says {page.status}")
        return sum(map(float, pattern.findall(page.body)))
