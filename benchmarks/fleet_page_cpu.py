"""CPU time and bytes of a gateway's live page: a second's sums, and one viewer's message.

The page is the gateway's own; its replicas are made up, and each says one sample a second. A busy
one has other figures each second, an idle one the same. Run from the checkout:
`python benchmarks/fleet_page_cpu.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from millrace.common.http_client import Target
from millrace.dashboard.sample import Sample
from millrace.dashboard.stream import Cursor
from millrace.gateway.admin.live_page import FleetPage
from millrace.gateway.common.shared_counters import SharedCounters
from millrace.gateway.health.events import FleetEvents
from millrace.gateway.routing.replicas import Member


def sample(second: int, index: int, busy: bool) -> Sample:
    """A second of a replica."""
    if not busy:
        return Sample(at=second, pages=(0, 1000), states=(4, 64), power=90)
    n = second * 31 + index * 7
    return Sample(
        at=second, tokens_in=4000 + n % 997, tokens_out=900 + n % 101, running=40 + n % 9,
        waiting=n % 5, pages=(900 - n % 300, 1000), states=(20, 64), queries=4000, hits=2600,
        drafts=400, draft_tokens=1200, accepted=[300, 180, 90 + n % 9],
        steps=[30, 0.6, 0.1, 1, 0.05, 0, 6, 0.3, 0.02], ttft=[(8, 2), (11, n % 9), (15, 1)],
        itl=[(6, 300), (8, 80), (12, 4)], tpot=[(5, 4), (7, 9)], power=400 + n % 280, ended=4,
    )  # fmt: skip


def timed(work: Callable[[], object]) -> float:
    """CPU milliseconds of a call."""
    began = time.thread_time_ns()
    work()
    return (time.thread_time_ns() - began) / 1e6


def measure(replicas: int, busy: int, seconds: int) -> tuple[float, float, float]:
    """Median ms of a second's sums and of a viewer's message, and the message's mean bytes."""
    members = [
        Member(id=i, slot=i, target=Target("10.0.0.1", i + 1), state="up", kind="millrace")
        for i in range(replicas)
    ]
    counters = SharedCounters(1, replicas=max(replicas, 8))
    page = FleetPage(
        counters, lambda: members, lambda m: str(m.id), FleetEvents(lambda m: str(m.id)), {}
    )
    cursor, sums, messages, sizes = Cursor(), [], [], []
    for second in range(seconds):
        for index in range(replicas):
            page.add(index, [sample(second, index, index < busy)])
        sums.append(timed(page.tick))
        began = time.thread_time_ns()
        message, cursor = page.message(cursor)
        messages.append((time.thread_time_ns() - began) / 1e6)
        sizes.append(len(message))
    later = sizes[1:]  # the first message has everything
    return (*(sorted(s[1:])[len(later) // 2] for s in (sums, messages)), sum(later) / len(later))


def main() -> None:
    """Print a row for each number of replicas and of busy ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=30)
    args = parser.parse_args()
    print("| replicas | busy | sums, ms a second | one viewer, ms a second | bytes a second |")
    print("|---|---|---|---|---|")
    for replicas, busy in ((1, 1), (8, 8), (1000, 0), (1000, 100), (1000, 1000)):
        sums, message, size = measure(replicas, busy, args.seconds)
        print(f"| {replicas:,} | {busy:,} | {sums:.2f} | {message:.2f} | {size:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
