"""What one run does: where, what, when, how much. Plain data, the same in every process."""

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
    """What one run does; names as the flags of the command.

    model: None takes the first model the server names. vocab_size: None asks the server.
    duration: seconds after which no more requests are sent. processes: how many send. timeout and
    ready_timeout are seconds. metrics_urls: the replicas' own addresses, for their /metrics; none
    asks the target. gpus: of the server, for figures per GPU.
    """

    target: Target
    backend: Backend = "openai"
    endpoint: str | None = None
    model: str | None = None
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
    metrics_urls: tuple[str, ...] = ()
    dcgm_url: str | None = None
    gpus: int | None = None

    @property
    def chat(self) -> bool:
        """Whether messages are sent, and not a prompt."""
        return self.backend == "openai-chat"

    @property
    def as_text(self) -> bool:
        """Whether prompts are made of words: a chat takes no token ids, and a conversation needs
        what was answered."""
        return self.chat or getattr(self.workload, "turns", 1) > 1
