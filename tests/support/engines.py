"""Engines over a tiny random model, for tests that compare their tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from millrace.config import engine_args
from millrace.engine.engine import Engine
from millrace.engine.scheduler import Scheduler
from millrace.kernels.batch import Batch
from millrace.protocol import AddRequest, EngineStats, SamplingParams
from millrace.replica import build as replica
from millrace.runtime.step.drafter import Drafter
from millrace.runtime.step.inputs import SampledRows
from millrace.runtime.step.runner import Runner
from millrace.runtime.worker import Worker

TIE = 1e-4  # two runs may differ only where the two best logits are closer than this

Prompts = Sequence[list[int]]

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "max_num_seqs": 4,
    "max_model_len": 256,
    "enable_prefix_caching": False,
    "snapshot_distance": 0,  # so that short prompts have snapshots too
    "debug": True,
}


def build(model: Path, **options: Any) -> Engine:
    """An engine of four sequences in fp32, with every invariant checked after each step."""
    return replica.build_engine(engine_args(**{"model": str(model), **DEFAULTS, **options}))


def with_few_pages(engine: Engine, pages: int) -> Engine:
    """The same engine with fewer pages to hand out, so that requests are preempted."""
    engine.scheduler = Scheduler(msgspec.structs.replace(engine.scheduler.limits, num_pages=pages))
    return engine


def generate(
    engine: Engine,
    prompts: Prompts,
    max_tokens: int = 24,
    *,
    between: Callable[[], None] | None = None,
    salts: Sequence[str] | None = None,
    background: frozenset[int] = frozenset(),
    **params: Any,
) -> list[list[int]]:
    """Every prompt's tokens, all of them added at once. salts: each prompt's cache salt.
    background: the numbers of those that are batch work."""
    salts = salts or [""] * len(prompts)
    params = {"temperature": 0.0, "ignore_eos": True, **params}
    for index, prompt in enumerate(prompts):
        chosen = SamplingParams(max_tokens=max_tokens, **params)
        request = AddRequest(
            str(index), list(prompt), chosen, cache_salt=salts[index],
            background=index in background,
        )  # fmt: skip
        engine.add(request)
    out: list[list[int]] = [[] for _ in prompts]
    while engine.has_work():
        for delta in engine.step():
            out[int(delta.id)] += delta.token_ids
        if between:
            between()
    return out


def run(
    model: Path, prompts: Prompts, max_tokens: int = 24, **options: Any
) -> tuple[list[list[int]], EngineStats]:
    """Build, generate greedily, close."""
    engine = build(model, **options)
    try:
        return generate(engine, prompts, max_tokens), engine.stats()
    finally:
        engine.close()


DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 5}


@dataclass(frozen=True)
class PlainAnswers:
    """What a model says to prompts without drafts: greedily, and drawn with DRAWN."""

    model: Path
    prompts: Prompts
    greedy: list[list[int]]
    drawn: list[list[int]]

    @classmethod
    def of(cls, model: Path, prompts: Prompts, max_tokens: int = 40) -> PlainAnswers:
        engine = build(model)
        greedy, drawn = (generate(engine, prompts, max_tokens, **how) for how in ({}, DRAWN))
        engine.close()
        return cls(model, prompts, greedy, drawn)

    @property
    def sequences(self) -> list[list[int]]:
        """Prompts with their greedy answers."""
        return [[*prompt, *said] for prompt, said in zip(self.prompts, self.greedy, strict=True)]

    def assert_said_by(self, engine: Engine) -> None:
        """The engine says the same; with a prefix cache also where it finds its answers in it."""
        size = len(self.greedy[0])
        for _ in range(1 + engine.scheduler.limits.prefix_caching):
            self.assert_equal(generate(engine, self.prompts, size))
        assert generate(engine, self.prompts, size, **DRAWN) == self.drawn

    def assert_equal(self, got: list[list[int]]) -> None:
        """These are the greedy tokens."""
        assert_same(self.model, self.prompts, self.greedy, got)


@dataclass
class WatchedDrafter:
    """The drafter of a runner; `after` sees, or changes on the tape, what each step drafts.

    after: called with the step's sampled rows and how many of their tokens count.
    """

    drafter: Drafter
    after: Callable[[SampledRows, Tensor], None]

    def observe(self, batch: Batch, hidden: Tensor) -> None:
        self.drafter.observe(batch, hidden)

    def resume(self, slots: Tensor, hidden: Tensor) -> None:
        self.drafter.resume(slots, hidden)

    def draft(self, hidden: Tensor, rows: SampledRows, count: Tensor, context: int) -> None:
        self.drafter.draft(hidden, rows, count, context)
        self.after(rows, count)


def runner_of(engine: Engine) -> Runner:
    """The runner of an engine's worker in this process."""
    assert isinstance(engine.worker, Worker)
    return engine.worker.runner


def watch_drafts(runner: Runner, after: Callable[[SampledRows, Tensor], None]) -> None:
    assert runner.drafter is not None
    runner.drafter = WatchedDrafter(runner.drafter, after)


def draft_well(engine: Engine, sequences: list[list[int]]) -> None:
    """Make drafts the right tokens at three positions in four. Slot i + 1 runs prompt i."""
    slots = runner_of(engine).slots

    def after(rows: SampledRows, count: Tensor) -> None:
        tape, lengths = slots.tokens, slots.length.tolist()
        for slot, sequence in enumerate(sequences, start=1):
            for position in range(lengths[slot] + 1, min(lengths[slot] + 6, len(sequence))):
                if random.Random(position).random() < 0.75:
                    tape[slot, position] = sequence[position]

    watch_drafts(runner_of(engine), after)


def watch_logits(engine: Engine) -> list[Tensor]:
    """A list that gets the logits [R, V] of each step's candidates."""
    assert isinstance(engine.worker, Worker)
    head = engine.worker.model.head
    original, seen = head.logits, list[Tensor]()
    head.logits = lambda hidden: seen.append(original(hidden)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    return seen


def logits_after(model: Path, tokens: list[int]) -> Tensor:
    """float32 [V]: the logits after `tokens`, from one cold prefill."""
    engine = build(model)
    seen = watch_logits(engine)
    generate(engine, [tokens], 1)
    engine.close()
    return seen[-1][0]


def assert_same(
    model: Path,
    prompts: Prompts,
    expected: list[list[int]],
    got: list[list[int]],
    tie: float = TIE,
) -> None:
    """Equal tokens, or a first difference where the model's two best logits are within `tie`."""
    for prompt, want, have in zip(prompts, expected, got, strict=True):
        assert len(want) == len(have)
        if want == have:
            continue
        at = next(i for i, (a, b) in enumerate(zip(want, have, strict=True)) if a != b)
        best = torch.topk(logits_after(model, [*prompt, *want[:at]]), 2).values
        assert float(best[0] - best[1]) < tie, f"token {at}: {want[at]} became {have[at]}"
