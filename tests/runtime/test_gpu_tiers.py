"""Answers and lower tiers on a GPU: the tokens of a cold run, with graphs, drafts and pipelining.

The CPU twins are in test_next_turn.py and test_tiers.py.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.model.tiny import TinyShape, write_checkpoint
from tests.support.engines import assert_same, build, generate

pytestmark = pytest.mark.gpu

GPU_TIE = 1e-2
_rng = random.Random(12)
LINES = [[_rng.randrange(3, 2000) for _ in range(n)] for n in (40, 65, 100)]
NEW = [5, 6, 7]
LENGTH = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("gpu") / "model", TinyShape(), seed=3)


@pytest.fixture(scope="module")
def turns(model: Path) -> list[tuple[list[list[int]], list[list[int]]]]:
    """(prompts, answers) of three turns of each line, computed on a CPU."""
    engine = build(model, debug=False)
    found, prompts = [], LINES
    for _ in range(3):
        answers = [generate(engine, [prompt], LENGTH)[0] for prompt in prompts]
        found.append((prompts, answers))
        prompts = [[*p, *a, *NEW] for p, a in zip(prompts, answers, strict=True)]
    engine.close()
    return found


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("eager", [False, True])
def test_next_turns_come_back_from_every_tier(
    model: Path,
    turns: list[tuple[list[list[int]], list[list[int]]]],
    tmp_path: Path,
    k: int,
    eager: bool,
) -> None:
    drafts = {"speculative_config": {"num_speculative_tokens": k}} if k else {}
    given: dict[str, Any] = {
        "device": "cuda", "dtype": "float32", "enable_prefix_caching": True, "num_snapshots": 2,
        "host_cache_gb": 0.05, "disk_cache": str(tmp_path), "enforce_eager": eager,
        "gpu_memory_utilization": 0.3, "debug": False, **drafts,
    }  # fmt: skip
    known = 0
    for number, (prompts, answers) in enumerate(turns):
        if number in (0, 2):  # the last turn comes from files
            engine = build(model, **given)
        for prompt, answer in zip(prompts, answers, strict=True):
            before = engine.stats().prefix_hits
            torch.cuda.set_sync_debug_mode("error")
            got = generate(engine, [prompt], LENGTH)
            torch.cuda.set_sync_debug_mode("default")
            assert_same(model, [prompt], [answer], got, tie=GPU_TIE)
            known += engine.stats().prefix_hits - before
        while engine.has_work():
            engine.step()
        if number in (1, 2):
            engine.close()
    missed = sum(len(p) - len(NEW) - 1 for prompts, _ in turns[1:] for p in prompts) - known
    assert missed <= 32  # an answer that differs at a tie is new in the next turn
    assert engine.stats().disk_hits > 0
