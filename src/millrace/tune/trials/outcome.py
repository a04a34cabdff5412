"""What a visit found. A visit is one start of a server for a trial, with one load or several."""

from __future__ import annotations

from typing import Literal

import msgspec

from millrace.tune.space.knobs import Bottleneck, Settings
from millrace.tune.trials.failures import Failure

# "drafts": the best settings with other numbers of drafts, at several batch sizes.
Purpose = Literal["short", "anchor", "full", "drafts"]
# What a trial can be best at; each is a figure of a run, and more is better.
Objective = Literal["throughput", "per_gpu", "per_dollar", "goodput"]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One load. Throughput in tok/s, goodput in requests/s, latencies in ms.

    seed: of its prompts; no two loads of a trial have the same. client_error: how far the load
    generator's figures may be off, relative. client_bound: why they are a lower bound; empty where
    they are not. figures: more of the run, for reports.
    """

    seed: int = 0
    total: float = 0.0
    output: float = 0.0
    goodput: float = 0.0
    ttft_p50: float = 0.0
    ttft_p99: float = 0.0
    tpot_p50: float = 0.0
    itl_p99: float = 0.0
    completed: int = 0
    failed: int = 0
    client_error: float = 0.0
    client_bound: str = ""
    bottleneck: Bottleneck | None = None
    why: str = ""
    figures: dict[str, float] = {}

    def value(self, objective: Objective, devices: int, dollars_per_hour: float) -> float:
        """The figure that is to be largest. per_dollar: tokens for a dollar."""
        if objective == "goodput":
            return self.goodput
        if objective == "per_gpu":
            return self.total / max(1, devices)
        if objective == "per_dollar":
            return self.total * 3600.0 / (dollars_per_hour * max(1, devices))
        return self.total


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a visit found. runs: those that ended before a failure. accuracy: share of right answers
    of `items`, None where it was not measured. seconds: what the visit took, the start included."""

    runs: tuple[Run, ...] = ()
    failure: Failure | None = None
    accuracy: float | None = None
    items: int = 0
    seconds: float = 0.0
    start_seconds: float = 0.0


class Visit(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done. number: its place in the journal. round: of visits by turns, else 0.
    seeds: one for each load; streams: requests in flight of each load, empty: those of the study.
    accuracy: whether answers are checked too. source: who asked for the trial; why: in words."""

    number: int
    trial: int
    settings: Settings
    purpose: Purpose
    round: int = 0
    seeds: tuple[int, ...] = ()
    streams: tuple[int, ...] = ()
    accuracy: bool = False
    source: str = ""
    why: str = ""
