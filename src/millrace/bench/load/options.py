"""The options of one run: server, workload, schedule and limits. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from millrace.bench.flags.structs import Backend
from millrace.bench.load.arrivals import Schedule
from millrace.bench.workload.prompts import Workload
from millrace.common.http_client import Target

ENDPOINTS: Mapping[Backend, str] = {
    "openai": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
    "vllm": "/v1/completions",
}


class BenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of one run, named as the flags of the command.

    model: None takes the first model that the server lists. model_id: its name in the results, None
    for the same. label: a name for the run. vocab_size: None asks the server.
    duration: seconds after which no more requests are sent. processes: number of load processes.
    timeout and ready_timeout are in seconds. metrics_urls: addresses of replicas whose /metrics are
    read; none reads the target's. reset_prefix_cache: whether caches are emptied before the run.
    gpus: number of GPUs of the server, for figures per GPU. others: servers like the target that
    take their share of its requests.
    """

    target: Target
    others: tuple[Target, ...] = ()
    backend: Backend = "openai"
    endpoint: str | None = None
    model: str | None = None
    model_id: str | None = None
    label: str | None = None
    workload: Workload
    vocab_size: int | None = None
    schedule: Schedule = Schedule()
    duration: float | None = None
    max_concurrency: int | None = None
    processes: int = 1
    num_warmups: int = 0
    temperature: float = 0.0
    ignore_eos: bool = False
    extra_body: dict[str, Any] = {}
    headers: tuple[tuple[str, str], ...] = ()
    percentiles: tuple[float, ...] = (99.0,)
    objectives: dict[str, float] = {}
    timeout: float = 600.0
    ready_timeout: float = 0.0
    reset_prefix_cache: bool = False
    metrics_urls: tuple[str, ...] = ()
    dcgm_url: str | None = None
    observe: str | None = None
    gpus: int | None = None

    @property
    def targets(self) -> tuple[Target, ...]:
        """All servers that are loaded."""
        return (self.target, *self.others)

    @property
    def chat(self) -> bool:
        """Whether requests carry messages instead of a prompt."""
        return self.backend == "openai-chat"

    @property
    def as_text(self) -> bool:
        """Whether prompts are words instead of token ids: a chat takes no token ids, and a
        conversation continues with the text of the answers."""
        return self.chat or getattr(self.workload, "turns", 1) > 1
