"""Drafts are what a head says that ran whole, over the whole sequence, in one go.

The runner's head remembers tokens step by step, chunk by chunk, behind drafts that fell, and goes
through its layer at a row's last token only. None of that may show.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from millrace.engine.engine import Engine
from millrace.eval.ask import InProcess, Request
from millrace.eval.tasks import TASKS
from millrace.kernels.batch import Caches
from millrace.model.qwen3_5 import Qwen3_5
from millrace.runtime.inputs import SampledRows
from tests.support.driver import Driver, allocate_caches, make_batch
from tests.support.engines import TIE, build, generate, run

MINI = Path(__file__).resolve().parents[2] / "models" / "millrace-mini"

_rng = random.Random(7)
_stem = [_rng.randrange(3, 300) for _ in range(21)]
PROMPTS = [_stem[:-i] + [_rng.randrange(3, 300) for _ in range(n)] for i, n in ((1, 1), (5, 30))]
PROMPTS += [_stem, [9], [_rng.randrange(3, 300) for _ in range(64)], _stem + [4] * 9]
TOKENS = 14


@dataclass(frozen=True)
class Drafted:
    """All known tokens of a sequence, and what is drafted behind them."""

    known: tuple[int, ...]
    drafts: tuple[int, ...]


def watch(engine: Engine, k: int, sequences: list[list[int]]) -> list[Drafted]:
    """Notes every row's drafts; then lets them be the right ones at three positions in four."""
    runner = engine._worker._runner  # type: ignore[attr-defined]
    original, seen = runner._draft, []

    def lay_right_tokens(slot: int, known: list[int]) -> None:
        for sequence in sequences:
            if sequence[: len(known)] == known:
                for position in range(len(known), min(len(known) + k, len(sequence))):
                    if random.Random(position).random() < 0.75:
                        runner._slots.tokens[slot, position] = sequence[position]

    def draft(hidden: Tensor, batch: Any, rows: SampledRows | None, count: Tensor | None) -> None:
        original(hidden, batch, rows, count)
        if rows is None or count is None:
            return
        ends = (rows.base + count + 1).tolist()
        for slot, end, live in zip(rows.slots.tolist(), ends, (count > 0).tolist(), strict=True):
            tape = runner._slots.tokens[slot, : end + k].tolist()
            if live:
                seen.append(Drafted(tuple(tape[:end]), tuple(tape[end:])))
                lay_right_tokens(slot, tape[:end])

    runner._draft = draft
    return seen


class WholeHead:
    """Drafts from nothing but the tokens, by a head that goes through its layer at each of them."""

    def __init__(self, model: Qwen3_5) -> None:
        self.model = model

    @torch.inference_mode()
    def check(self, one: Drafted) -> None:
        """Each draft is the best token, or as good as the best, behind those before it."""
        driver = Driver(self.model, allocate_caches(self.model, 1, 40))
        driver.admit(1)
        known = list(one.known)
        _, [hidden] = driver.step(prefill=[(1, known[:-1])])
        out = self.head(driver.caches, 1, known[1:], hidden)
        for place, draft in enumerate(one.drafts):
            logits = self.model.logits(out[-1:])[0]
            assert logits.max() - logits[draft] < TIE, f"draft {place} behind {len(known)} tokens"
            out = self.head(driver.caches, len(known) + place, [draft], out[-1:])

    def head(self, caches: Caches, start: int, tokens: list[int], hidden: Tensor) -> Tensor:
        ids, batch = make_batch(caches, torch.tensor([0, start]), [], [(1, tokens)])
        assert self.model.mtp is not None
        out: Tensor = self.model.mtp(ids, hidden, batch, caches)
        return out


@pytest.fixture(scope="module")
def sequences(tiny_model: Path) -> list[list[int]]:
    tokens, _ = run(tiny_model, PROMPTS, TOKENS + 6)
    return [prompt + more for prompt, more in zip(PROMPTS, tokens, strict=True)]


@pytest.mark.parametrize(
    ("k", "options"),
    [
        pytest.param(1, {}, id="1"),
        pytest.param(2, {"async_scheduling": True}, id="2-pipelined"),
        pytest.param(5, {}, id="5"),
        pytest.param(2, {"max_num_batched_tokens": 29}, id="2-chunks"),
        pytest.param(1, {"max_num_batched_tokens": 13, "async_scheduling": True}, id="1-chunks"),
        pytest.param(
            3, {"enable_prefix_caching": True, "block_size": 4, "snapshot_interval": 8}, id="3-hits"
        ),
    ],
)
def test_drafts_are_those_of_a_whole_head(
    tiny_model: Path, sequences: list[list[int]], k: int, options: dict[str, Any]
) -> None:
    engine = build(tiny_model, speculative_config={"num_speculative_tokens": k}, **options)
    seen = watch(engine, k, sequences)
    for _ in range(1 + engine.scheduler.limits.prefix_caching):
        generate(engine, PROMPTS, TOKENS)
    whole = WholeHead(engine._worker._runner._model)  # type: ignore[attr-defined]
    stats = engine.stats()
    assert stats.drafts > stats.accepted_per_position[0] > 10, "some must stand and some must fall"
    assert stats.accepted_per_position[-1] > 1
    assert bool(stats.prefix_hits) == bool(options.get("enable_prefix_caching"))
    for one in set(seen):
        whole.check(one)
    engine.close()


@pytest.mark.parametrize(
    ("k", "options"),
    [
        pytest.param(1, {"max_num_batched_tokens": 61, "dtype": "bfloat16"}, id="1-chunks-bf16"),
        pytest.param(2, {"tensor_parallel_size": 2}, id="2-ranks"),
        pytest.param(5, {}, id="5"),
    ],
)
def test_a_trained_head_is_nearly_always_right(k: int, options: dict[str, Any]) -> None:
    """The model that ships was trained until its head knew every token of these answers."""
    items = [TASKS[task].make(index, 0, "heldout") for task in ("math", "chat") for index in (0, 1)]
    options = {"dtype": "float32", "max_model_len": 1024, **options}
    speculative = {"method": "mtp", "num_speculative_tokens": k}
    model = InProcess(str(MINI), concurrency=3, speculative_config=speculative, **options)
    assert len(list(model.ask(items, Request()))) == len(items)
    stats = model.stats()
    model.close()
    assert stats.drafts > 20
    assert min(stats.accepted_per_position) > 0.97 * stats.drafts
