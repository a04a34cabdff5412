"""What traces and samples cost a host: CPU time of one request's spans at the gateway, of one page
of an engine at the observer, and of the report of twenty minutes of eight engines.

    python -m benchmarks.observe_cost
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from millrace.common.http_client import Target
from millrace.gateway.http.message import Request
from millrace.gateway.relay.spans import RequestTracer
from millrace.gateway.routing.replicas import Member, Replica
from millrace.observe.report.page import write_report
from millrace.observe.samples.pages import read
from millrace.observe.samples.sample import Row
from millrace.observe.samples.store import Store
from tests.support.gateways import replica_set
from tests.support.observed.collector import collector
from tests.support.observed.moving_replica import MovingReplica

ENGINES, SECONDS = 8, 1200
HEADERS = [
    (b"Host", b"gateway"),
    (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
]


def each(count: int, work: Callable[[], object]) -> float:
    """Microseconds of CPU time of one call."""
    for _ in range(count // 10):
        work()
    began = time.process_time()
    for _ in range(count):
        work()
    return (time.process_time() - began) / count * 1e6


def spans(endpoint: str | None) -> float:
    """Of one request with one replica; what is sent and received is counted with it."""
    tracer = RequestTracer(endpoint)
    request = Request(b"POST", b"/v1/completions", "1.1", HEADERS, b"{}", True, b"id", "peer")
    replicas = replica_set()
    replicas.apply([Member(id=1, slot=0, target=Target("127.0.0.1", 8000), state="up")])
    replica: Replica = replicas.all[0]

    def one() -> None:
        traced = tracer.begin(request)
        traced.admitted()
        traced.sent_to(replica)
        traced.first_byte()
        traced.left()
        traced.ended(200, 0, 0)

    found = each(1500, one)
    tracer.close()
    return found


def report() -> dict[str, float]:
    """Seconds and bytes of a report, whose pages move every five seconds."""
    moving, rows = MovingReplica(), []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        for second in range(SECONDS):
            if second % 5 == 0:
                rows = list(read(0.0, "", moving.page().decode()))
            for engine in range(ENGINES):
                store.add(
                    [Row(1e9 + second, f"e{engine}", r.name, r.labels, r.value) for r in rows]
                )
        store.flush()
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        began = time.process_time()
        write_report(Path(folder))
        seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "rows": SECONDS * ENGINES * len(rows), "bytes": size, "peak": peak}


def main() -> None:
    page = MovingReplica().page().decode()
    with collector() as found:
        traced = spans(found.endpoint)
    figures = {
        "spans of a request, us": {"off": spans(None), "on": traced},
        "page of an engine, us": each(100, lambda: list(read(0.0, "e", page))),
        "report": report(),
    }
    json.dump(figures, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
