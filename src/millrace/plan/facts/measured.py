"""The measured rows that the planner is held against, from all sources: measured.json."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any, Literal

import msgspec

Kind = Literal["closed", "step", "users"]
Metric = Literal["total", "output", "tpot", "ttft", "itl_p50", "itl_p99", "step", "joules"]


class StepRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step: `StepShape.of` with the width of the row's drafts."""

    rows: float = 0.0
    context: float = 0.0
    prompts: float = 0.0
    length: float = 0.0
    start: float = 0.0


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One measurement. kind: a closed loop; one step; or the throughput at which a user gets `user`
    tok/s. concurrency, requests: of one replica; copies: replicas that the value is a sum of.
    doubt: relative standard deviation of what is not known of the set-up. low, high: between runs,
    where known. aisimulate: that planner's figure. The other fields are
    those of Description, Load and Settings."""

    id: str
    gpu: str
    engine: str
    model: str
    metric: Metric
    value: float
    kind: Kind = "closed"
    weights: str = "fp8"
    draft_head: str = "fp8"
    kv: str = "fp8"
    state: str = "fp32"
    window: int = 16
    tensor: int = 1
    drafts: int = 0
    max_model_len: int = 4096
    text: str = "mixed"
    input: float = 1024.0
    output: float = 256.0
    concurrency: float = 1.0
    requests: float = 0.0
    user: float = 0.0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    mixed: int = 0
    apart: bool = False
    served: bool = True
    ranks: int = 1
    copies: int = 1
    step: StepRow = StepRow()
    doubt: float = 0.0
    low: float | None = None
    high: float | None = None
    aisimulate: float | None = None
    note: str = ""
    source: str = ""


class _Set(msgspec.Struct, frozen=True):
    name: str
    source: str
    common: dict[str, Any]
    rows: list[dict[str, Any]]


class _File(msgspec.Struct, frozen=True):
    note: str
    sets: list[_Set]


@functools.cache
def measured() -> tuple[Row, ...]:
    """All rows; ids are `set/row`."""
    text = resources.files("millrace.plan.facts").joinpath("measured.json").read_bytes()
    return tuple(
        msgspec.convert(
            {**one.common, "source": one.source, **row, "id": f"{one.name}/{row['id']}"}, Row
        )
        for one in msgspec.json.decode(text, type=_File).sets
        for row in one.rows
    )
