"""What conversations cost: time to first token by turn, and tokens computed again over new tokens.

*New* are the tokens of a prompt that no earlier request had: what comes behind the prompt and the
answer that it continues. *Recomputed* are those that the server did not find in its prefix cache,
by its own count (`usage`). So 1.0 is the least that a server can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from millrace.bench.load.records import RequestTiming
from millrace.bench.measure.metrics import successes
from millrace.bench.workload.agent import KINDS

_TURNS = ((1, 1), (2, 2), (3, 5), (6, 10), (11, 20), (21, 1 << 30))
_AUX = KINDS.index("aux")


def new_tokens(record: RequestTiming, base: RequestTiming | None) -> int:
    """Of a prompt. base: the request that it continues."""
    if base is None:
        return max(1, round(record.input_tokens * record.fresh / 1000))
    return max(1, record.input_tokens - base.input_tokens - base.output_tokens)


def reuse_fields(records: Sequence[RequestTiming], since: int = 0) -> dict[str, Any]:
    """TTFT by turn, and recomputed over new tokens, in all and by kind of request.

    since: only of requests from this one of their session on.
    """
    done = successes(records)
    by_turn = {(r.index, r.turn): r for r in done}
    done = [record for record in done if record.turn >= since]
    counts: dict[str, list[int]] = {}
    for record in done:
        base = by_turn.get((record.index, record.base)) if record.base >= 0 else None
        if record.cached_tokens < 0 or (record.base >= 0 and base is None):
            continue
        new, computed = new_tokens(record, base), record.input_tokens - record.cached_tokens
        for name in ("all", KINDS[record.kind]):
            found = counts.setdefault(name, [0, 0, 0])
            for place, value in enumerate((1, new, computed)):
                found[place] += value
    return {
        "turns": _by_turn(done),
        "tokens": {
            name: {
                "requests": count,
                "new": new,
                "recomputed": computed,
                "recomputed_over_new": computed / new,
            }
            for name, (count, new, computed) in counts.items()
        },
    }


def _by_turn(done: Sequence[RequestTiming]) -> list[dict[str, Any]]:
    """TTFT of the turns of conversations, without auxiliary calls."""
    places: dict[int, int] = {}
    groups: dict[tuple[int, int], list[float]] = {}
    for record in sorted(done, key=lambda r: (r.index, r.turn)):
        if record.kind == _AUX:
            continue
        turn = places[record.index] = places.get(record.index, 0) + 1
        span = next(span for span in _TURNS if span[0] <= turn <= span[1])
        groups.setdefault(span, []).append(record.ttft)
    return [
        {
            "turns": str(low) if low == high else f"{low}-{high}" if high < 1 << 30 else f"{low}+",
            "requests": len(groups[low, high]),
            "median_ttft_ms": 1e3 * float(np.median(groups[low, high])),
            "p95_ttft_ms": 1e3 * float(np.percentile(groups[low, high], 95)),
        }
        for low, high in sorted(groups)
    ]
