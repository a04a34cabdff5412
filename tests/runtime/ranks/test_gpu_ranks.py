"""Two GPUs: the tokens of the CPU, with every all-reduce algorithm (see test_metamorphic.py)."""

from __future__ import annotations

import multiprocessing
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.model.tiny import TinyShape, write_checkpoint
from millrace.runtime.ranks import allreduce
from tests.support.child_environment import child_environment
from tests.support.engines import assert_same, build, generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

GPU_TIE = 1e-2
_rng = random.Random(2)
PROMPTS = [[_rng.randrange(3, 2000) for _ in range(n)] for n in (1, 2, 17, 64, 65, 129)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = replace(TinyShape(), intermediate_size=648)
    return write_checkpoint(tmp_path_factory.mktemp("gpu") / "model", shape, seed=3)


@pytest.fixture(scope="module")
def on_cpu(model: Path) -> list[list[int]]:
    engine = build(model, max_num_seqs=8, debug=False)
    out = generate(engine, PROMPTS, 32)
    engine.close()
    return out


def in_a_process(case: Callable[..., Any], *given: Any) -> Any:
    """What `case` returns in a process of its own: GPUs share memory between ranks once in each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(case, *given).result(timeout=240)


def served(model: Path, name: str, eager: bool) -> tuple[set[str], list[list[list[int]]]]:
    """The chosen all-reduce algorithms, and the tokens of the same prompts, twice.

    An algorithm that is forced on rank 0 is used by all ranks: they use the same measured times.
    """
    timed = allreduce.cuda_us

    def favour(algorithm: Any, *given: Any) -> list[float]:
        found = timed(algorithm, *given)  # always: the other ranks take part in it
        return found if algorithm.name == name else [1e9] * 3

    if name != "chosen":
        allreduce.cuda_us = favour
    spec = {"num_speculative_tokens": 2}
    options = {"max_num_seqs": 8, "enforce_eager": eager, "speculative_config": spec}
    engine = build(model, device="cuda", tensor_parallel_size=2, **options)
    try:
        chosen = {t.algorithm for t in engine.worker.all_reduce.timings if t.chosen}
        return chosen, [generate(engine, PROMPTS, 32) for _ in range(2)]
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("name", "eager"),
    [
        ("chosen", False),
        ("chosen", True),
        ("nccl", False),
        ("one-shot", False),
        ("two-shot", False),
        ("one-shot with norm", False),
    ],
)
def test_the_cpus_tokens(model: Path, on_cpu: list[list[int]], name: str, eager: bool) -> None:
    chosen, runs = in_a_process(served, model, name, eager)
    assert name in ("chosen", *chosen)
    for run in runs:
        assert_same(model, PROMPTS, on_cpu, run, GPU_TIE)


def drawn(model: Path) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Tokens sampled from the ranks' parts of the logits, and from gathered logits."""
    spec = {"num_speculative_tokens": 2}
    engine = build(
        model, device="cuda", tensor_parallel_size=2, max_num_seqs=8, speculative_config=spec
    )
    try:
        return [
            (generate(engine, PROMPTS, 32, **how), generate(engine, PROMPTS, 32, **how, top_k=2048))
            for how in ({"temperature": 0.5, "seed": 4}, {"temperature": 1.0, "seed": 3})
        ]
    finally:
        engine.close()


def test_the_best_of_the_ranks_is_the_best_of_all_logits(model: Path) -> None:
    """A top_k that cuts nothing has all logits gathered; the draws are the same, bit for bit."""
    for split, gathered in in_a_process(drawn, model):
        assert split == gathered


def served_again(model: Path) -> list[list[list[int]]]:
    return [served(model, "chosen", False)[1][0] for _ in range(2)]


def test_a_second_engine_of_a_process_leaves_shared_memory_out(
    model: Path, on_cpu: list[list[int]]
) -> None:
    for run in in_a_process(served_again, model):
        assert_same(model, PROMPTS, on_cpu, run, GPU_TIE)


START = """
import sys
from pathlib import Path
import pytest
from tests.runtime.ranks.test_starts import start_failing_ranks
from tests.support.engines import build
with pytest.MonkeyPatch.context() as patch:
    start_failing_ranks(patch, *sys.argv[2:4], Path(sys.argv[4]))
    build(sys.argv[1], device="cuda", tensor_parallel_size=2)
"""


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        ("measuring", "kill"),
        ("profile run", "kill"),
        ("profile run", "raise"),
        ("capture", "kill"),
        ("capture", "raise"),
        ("first step", "kill"),
    ],
)
def test_a_rank_that_fails_while_kernels_wait_for_it(
    model: Path, stage: str, how: str, tmp_path: Path
) -> None:
    """Rank 0 raises, or ends where its GPU lets it do nothing else; it gives the reason."""
    note = tmp_path / "failed"
    command = [sys.executable, "-c", START, str(model), stage, how, str(note)]
    env = child_environment()
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    spent = time.time() - float(note.read_text())
    assert ended.returncode, ended.stderr
    assert re.search(r"rank 1 \(pid \d+\) (died with signal 9|ends: out of luck)", ended.stderr)
    assert spent < 30.0
