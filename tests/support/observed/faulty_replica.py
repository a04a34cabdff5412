"""Metrics pages of replicas that work, until a fault is planted in them."""

from __future__ import annotations

from time import monotonic

from millrace.protocol import STEP_TOKENS, DraftStats, EngineStats, PartWork, WorkStats
from millrace.server.telemetry.metrics import MetricsPage, RequestMetrics
from millrace.server.telemetry.work_metrics import WorkMetrics


class FaultyReplica:
    """A server whose engine does steady work by the clock. fault: the name of an alert, whose
    cause is there from now on; empty: none."""

    def __init__(self) -> None:
        self.fault = ""
        self._began = monotonic()
        self._stood_still = 0.0  # seconds of work when it got stuck
        self.requests = RequestMetrics()
        self._page = MetricsPage(
            "m", self.requests, self._stats, up=lambda: self.fault != "MillraceEngineDown",
            work=WorkMetrics(self._work, lambda: "NVIDIA H200", self._gpus),
        )  # fmt: skip

    def plant(self, alert: str) -> None:
        self._stood_still = self._seconds()
        self._planted = monotonic()
        self.fault = alert

    def _seconds(self) -> float:
        """Of work so far; it ends when the engine is stuck."""
        stuck = self.fault == "MillraceEngineStuck"
        return self._stood_still if stuck else monotonic() - self._began

    def _since(self) -> float:
        return monotonic() - self._planted if self.fault else 0.0

    def page(self) -> bytes:
        done = int(20 * self._seconds())
        failed = int(2 * self._since()) if self.fault == "MillraceErrorBudgetFast" else 0
        self.requests.finished["stop"], self.requests.finished["error"] = done, failed
        return self._page.render()

    def _stats(self) -> EngineStats:
        n, fault = int(100 * self._seconds()), self.fault
        full = fault == "MillraceKvCacheFull"
        waiting = int(10 * self._since()) if fault == "MillraceQueueGrowing" else 5 * full
        preemptions = int(5 * self._since()) if fault == "MillracePreemptions" else 0
        return EngineStats(
            steps=n, generated_tokens=40 * n, prompt_tokens=20 * n, prefix_queries=20 * n,
            prefix_hits=5 * n, running=32, waiting=waiting, total_pages=1000,
            free_pages=10 if full else 500, preemptions=preemptions, drafts=n, draft_tokens=n,
            accepted_per_position=[int(0.8 * n)], step_tokens=[n] * (len(STEP_TOKENS) + 1),
            step_tokens_sum=n, rows_not_finite=int(fault == "MillraceNotFinite"),
            draft_methods={"mtp": DraftStats(n, n, [int(0.8 * n)])},
        )  # fmt: skip

    def _work(self) -> WorkStats:
        """A quarter of the compute peak and a half of the memory's; or next to nothing; or more
        than there is."""
        share = {"MillraceFiguresContradict": 0.01, "MillraceWorkAbovePeak": 8.0}.get(self.fault)
        t = self._stood_still + share * self._since() if share else self._seconds()
        part = PartWork("fp8", 0.25 * 1979e12 * t, 0.5 * 4.8e12 * t, 0.0)
        return WorkStats(self._seconds(), {"linear": part})

    def _gpus(self) -> dict[tuple[str, str], dict[str, float]]:
        return {
            ("0", "GPU-0"): {"power_watts": 600.0, "power_limit_watts": 700.0, "energy_joules": 1.0}
        }
