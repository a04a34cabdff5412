"""What bursts of prompts do to the streams that run beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from millrace.bench.load.records import RequestTiming
from millrace.bench.measure.metrics import successes
from millrace.bench.workload.prompts import TraceSpec


def burst_fields(spec: TraceSpec, records: Sequence[RequestTiming]) -> dict[str, Any]:
    """Gaps of the streams, and times to first tokens of the prompts beside them."""
    done = successes(records)
    gaps = [np.diff(r.chunk_ns) / 1e6 for r in done if r.index < spec.streams]
    first = [1e3 * r.ttft for r in done if r.index >= spec.streams]
    found: dict[str, Any] = {}
    for name, values in (("stream_itl", np.concatenate([[], *gaps])), ("prompt_ttft", first)):
        for part in (50, 95, 99) if len(values) else ():
            found[f"p{part}_{name}_ms"] = float(np.percentile(values, part))
    return found
