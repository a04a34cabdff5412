"""A page of metrics that moves with every reading, and where it can be read over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from millrace.protocol import STEP_TOKENS, DraftStats, EngineStats, PartWork, WorkStats
from millrace.server.telemetry.metrics import MetricsPage, RequestMetrics
from millrace.server.telemetry.work_metrics import WorkMetrics


class MovingReplica:
    """A server whose figures move with every reading."""

    def __init__(self) -> None:
        self.requests, self.count = RequestMetrics(), 0
        self._page = MetricsPage(
            "m", self.requests, self._stats, lambda: {"block_size": "16"},
            work=WorkMetrics(
                self._work, lambda: "NVIDIA H200",
                lambda: {("0", "GPU-0"): {"power_watts": 650.0, "power_limit_watts": 700.0,
                               "energy_joules": 650.0 * self.count, "memory_used_bytes": 1e9}},
            ),
        )  # fmt: skip

    def page(self) -> bytes:
        self.count += 1
        for histogram in vars(self.requests).values():
            if hasattr(histogram, "buckets"):
                histogram.observe(0.3)
        for reason in ("stop", "length", "abort", "error"):
            self.requests.finished[reason] += 1
        for status in (200, 503):
            self.requests.http["/v1/completions", "POST", status] += 1
        self.requests.http_durations.observe("/v1/completions", "POST", 0.2)
        return self._page.render()

    def _stats(self) -> EngineStats:
        n = self.count
        moving = dict.fromkeys(
            ("steps", "preemptions", "generated_tokens", "prefix_hits", "drafts", "draft_tokens",
             "step_tokens_sum"), n,
        )  # fmt: skip
        return EngineStats(
            **moving, prompt_tokens=2 * n, prefix_queries=2 * n, running=3, waiting=2,
            total_pages=10, free_pages=5, accepted_per_position=[n, n // 2],
            draft_methods={"mtp": DraftStats(n, n, [n])}, step_tokens=[n] * (len(STEP_TOKENS) + 1),
        )  # fmt: skip

    def _work(self) -> WorkStats:
        n = float(self.count)
        return WorkStats(n / 4, {"linear": PartWork("fp8", 1e14 * n, 1e12 * n, 1e9 * n)})


@contextmanager
def served(page: Callable[[], bytes], port: int = 0) -> Iterator[int]:
    """Serve what `page` returns at every path of a port of this host."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = page()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    ThreadingHTTPServer.allow_reuse_address = True
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
