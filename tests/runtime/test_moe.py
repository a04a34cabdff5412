"""Mixtures of experts in the engine: with every option the greedy tokens stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.kernels.cpu.w4 import is_supported
from millrace.model.layers import moe
from millrace.model.tiny import FP8_BLOCKS, QWEN3_MOE, moe_config_json, write_checkpoint
from tests.runtime.test_metamorphic import PROMPTS, mtp
from tests.support.engines import assert_same, build, generate, run, with_few_pages

KINDS = {"qwen3": QWEN3_MOE, "qwen3_5": moe_config_json()}
QUANTIZED = {
    **QWEN3_MOE, "hidden_size": 128, "head_dim": 128, "num_hidden_layers": 2,
    "moe_intermediate_size": 256, "num_experts": 4, "quantization_config": FP8_BLOCKS,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("moe")
    return {
        kind: write_checkpoint(directory / kind, config, seed=1, fused=kind == "qwen3_5")
        for kind, config in KINDS.items()
    }


@pytest.fixture(scope="module")
def cold(models: dict[str, Path]) -> dict[str, list[list[int]]]:
    """Each prompt alone, in one chunk, without drafts or cache."""
    return {
        kind: [run(model, [prompt], max_num_seqs=1)[0][0] for prompt in PROMPTS]
        for kind, model in models.items()
    }


CACHED = {"enable_prefix_caching": True, "block_size": 4}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("qwen3", {}, id="co-batched"),
        pytest.param("qwen3", {**CACHED, "max_num_batched_tokens": 29}, id="cached-chunks"),
        pytest.param(
            "qwen3",
            {**CACHED, "tensor_parallel_size": 2},
            id="cached-two-ranks",
            marks=pytest.mark.sweep,
        ),
        pytest.param("qwen3_5", {"async_scheduling": True}, id="hybrid-pipelined"),
        pytest.param("qwen3_5", {"max_num_batched_tokens": 13}, id="hybrid-chunks"),
        pytest.param("qwen3_5", mtp(1), id="hybrid-mtp-1"),
        pytest.param("qwen3_5", mtp(3, **CACHED, snapshot_interval=8), id="hybrid-mtp-3-cached"),
        pytest.param(
            "qwen3_5",
            mtp(2, tensor_parallel_size=2, enable_expert_parallel=True),
            id="hybrid-mtp-2-two-ranks-with-whole-experts",
        ),
    ],
)
def test_same_tokens(
    models: dict[str, Path], cold: dict[str, list[list[int]]], kind: str, options: dict[str, Any]
) -> None:
    got, _ = run(models[kind], PROMPTS, **options)
    assert_same(models[kind], PROMPTS, cold[kind], got)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_5"])
def test_every_token_counts_once_for_each_of_its_experts(
    models: dict[str, Path], kind: str
) -> None:
    """Whatever the batches, and in every layer; prompts without their cached part."""
    options: dict[str, Any] = {"num_speculative_tokens": 2, "method": "mtp"}
    drafts = {"speculative_config": options} if kind == "qwen3_5" else {}
    engine = build(models[kind], report_expert_load=True, enable_prefix_caching=False, **drafts)
    before = engine.expert_load()
    outputs = generate(engine, PROMPTS)
    after, stats, c = engine.expert_load(), engine.stats(), engine.worker.model_config
    engine.close()
    assert c.experts is not None
    layers = c.num_layers + bool(drafts)
    assert len(after) == layers
    assert "mtp.layers.0" in after or not drafts
    counts = [sum(after[layer]) - sum(before[layer]) for layer in list(after)[: c.num_layers]]
    assert all(len(load) == c.experts.count for load in after.values())
    generated = sum(map(len, outputs))
    run_tokens = stats.prompt_tokens + generated - len(PROMPTS)
    rejected = 2 * stats.drafts - sum(stats.accepted_per_position)
    if not drafts:
        assert set(counts[:-1]) == {c.experts.top_k * run_tokens}
        return
    assert len(set(counts)) == 1
    assert counts[0] >= c.experts.top_k * run_tokens
    assert counts[0] <= c.experts.top_k * (run_tokens + rejected + 3 * len(PROMPTS))


def test_same_tokens_when_preempted(
    models: dict[str, Path], cold: dict[str, list[list[int]]]
) -> None:
    engine = with_few_pages(build(models["qwen3"], enable_prefix_caching=True), 18)
    got = generate(engine, PROMPTS)
    assert engine.stats().preemptions > 0
    assert_same(models["qwen3"], PROMPTS, cold["qwen3"], got)
    engine.close()


def test_fp8_blocks_on_two_ranks(tmp_path: Path) -> None:
    """A block of each expert on every rank, dequantized."""
    directory = write_checkpoint(tmp_path / "fp8", QUANTIZED, seed=2)
    alone = [run(directory, [prompt], 8)[0][0] for prompt in PROMPTS[:4]]
    got, _ = run(directory, PROMPTS[:4], 8, tensor_parallel_size=2)
    assert_same(directory, PROMPTS[:4], alone, got)


def test_fp8_experts_stay_so_in_bfloat16(tmp_path: Path) -> None:
    """Where the processor multiplies bfloat16; the first tokens are those of exact weights."""
    config = {**QUANTIZED, "dtype": "bfloat16"}
    directory = write_checkpoint(tmp_path / "fp8", config, seed=2)
    engine = build(directory, dtype="bfloat16")
    values = engine.worker.model.layers[0].mlp.experts.gate_up_values
    kept = values.dtype == torch.float8_e4m3fn
    got = generate(engine, PROMPTS[:4], 8)
    engine.close()
    assert kept == is_supported()
    exact = [run(directory, [prompt], 8, dtype="float32")[0][0] for prompt in PROMPTS[:4]]
    assert [tokens[0] for tokens in got] == [tokens[0] for tokens in exact]


def test_a_shared_expert_behind_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a GPU, if it is as wide as they are."""
    config = {**KINDS["qwen3_5"], "shared_expert_intermediate_size": 32}
    directory = write_checkpoint(tmp_path / "equal", config, seed=1)
    apart, _ = run(directory, PROMPTS[:4], 8, **mtp(1))
    monkeypatch.setattr(moe, "joins_shared", lambda build, prefix: True)
    engine = build(directory, report_expert_load=True, **mtp(1))
    layers = [m for m in engine.worker.model.modules() if isinstance(m, moe.MoE)]
    assert all(m.shared is None and m.experts.count == m.count + 1 for m in layers)
    assert all(m.load is not None and len(m.load) == m.count for m in layers)
    assert_same(directory, PROMPTS[:4], apart, generate(engine, PROMPTS[:4], 8))
    engine.close()
