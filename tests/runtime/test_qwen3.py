"""Qwen3 dense in the engine: with every option the greedy tokens of a prompt stay the same.

It has no recurrent state, so the prefix cache resumes at any page boundary, without snapshots.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.errors import ConfigError
from millrace.model.tiny import FP8_BLOCKS, QWEN3, write_checkpoint
from tests.runtime.step.test_cuda_graphs import in_graph_sizes
from tests.support.engines import assert_same, build, generate, run, with_few_pages

_rng = random.Random(0)
_stem = [_rng.randrange(3, 300) for _ in range(40)]
PROMPTS = [
    _stem[: _rng.randint(0, 40)] + [_rng.randrange(3, 300) for _ in range(_rng.randint(1, 50))]
    for _ in range(6)
] + [[_rng.randrange(3, 300) for _ in range(n)] for n in (1, 2, 16, 17, 64, 65)]
QUANTIZED = {
    **QWEN3, "hidden_size": 128, "head_dim": 128, "num_hidden_layers": 2, "intermediate_size": 256,
    "quantization_config": FP8_BLOCKS,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_checkpoint(tmp_path_factory.mktemp("qwen3") / "model", QWEN3, seed=1)


@pytest.fixture(scope="module")
def cold(model: Path) -> list[list[int]]:
    """Each prompt alone, in one chunk, without a cache."""
    return [run(model, [prompt], max_num_seqs=1)[0][0] for prompt in PROMPTS]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="co-batched"),
        pytest.param({"async_scheduling": True}, id="pipelined"),
        pytest.param({"max_num_batched_tokens": 4}, id="chunks-of-4"),
        pytest.param({"max_num_batched_tokens": 65, "block_size": 1}, id="pages-of-1"),
        pytest.param({"enable_prefix_caching": True}, id="prefix-cache"),
        pytest.param(
            {"enable_prefix_caching": True, "block_size": 4, "max_num_batched_tokens": 29,
             "long_prefill_token_threshold": 20, "async_scheduling": True},
            id="prefix-cache-pipelined-chunks",
        ),
    ],
)  # fmt: skip
def test_same_tokens(model: Path, cold: list[list[int]], options: dict[str, Any]) -> None:
    got, _ = run(model, PROMPTS, **options)
    assert_same(model, PROMPTS, cold, got)


@pytest.mark.parametrize("options", [{}, {"enable_prefix_caching": True, "block_size": 4}])
def test_same_tokens_in_the_sizes_of_graphs(
    model: Path, cold: list[list[int]], options: dict[str, Any]
) -> None:
    engine = in_graph_sizes(build(model, max_num_batched_tokens=40, **options))
    for _ in range(2):
        assert_same(model, PROMPTS, cold, generate(engine, PROMPTS))
    engine.close()


def test_prefixes_are_hit_at_every_page(model: Path, cold: list[list[int]]) -> None:
    """On their second use all whole pages of a prompt but its last token are found."""
    engine = build(model, enable_prefix_caching=True, block_size=4)
    assert_same(model, PROMPTS, cold, generate(engine, PROMPTS))
    before = engine.stats().prefix_hits
    assert_same(model, PROMPTS, cold, generate(engine, PROMPTS))
    assert engine.stats().prefix_hits - before == sum((len(p) - 1) // 4 * 4 for p in PROMPTS)
    engine.close()


@pytest.mark.parametrize("pipelined", [False, True])
def test_same_tokens_when_preempted(model: Path, cold: list[list[int]], pipelined: bool) -> None:
    engine = build(model, async_scheduling=pipelined, enable_prefix_caching=True)
    engine = with_few_pages(engine, 18)
    got = generate(engine, PROMPTS)
    assert engine.stats().preemptions > 0
    assert_same(model, PROMPTS, cold, got)
    engine.close()


def test_same_tokens_on_two_ranks(model: Path, cold: list[list[int]]) -> None:
    got, _ = run(model, PROMPTS, tensor_parallel_size=2, enable_prefix_caching=True)
    assert_same(model, PROMPTS, cold, got)


@pytest.mark.parametrize("ranks", [1, 2])
def test_fp8_blocks_and_bfloat16(tmp_path: Path, ranks: int) -> None:
    """FP8 weights become bfloat16 on a CPU; batches and ranks round a little differently."""
    directory = write_checkpoint(tmp_path / "fp8", QUANTIZED, seed=2)
    options = {"dtype": "bfloat16", "tensor_parallel_size": ranks}
    alone = [run(directory, [prompt], 8, dtype="bfloat16")[0][0] for prompt in PROMPTS[:4]]
    got, _ = run(directory, PROMPTS[:4], 8, **options)
    assert_same(directory, PROMPTS[:4], alone, got, tie=0.1)


def test_drafts_need_a_draft_head(model: Path) -> None:
    with pytest.raises(ConfigError, match="has no MTP head"):
        build(model, speculative_config={"num_speculative_tokens": 1})
