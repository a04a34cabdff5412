"""Qwen3 dense on a GPU: the CPU's tokens, in the same graphs; FP8 weights that stay FP8.

The CPU twins of these tests are in test_qwen3.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.model.tiny import FP8_BLOCKS, SHAPES, write_checkpoint
from tests.oracle.eagle3_twin import write_eagle3
from tests.runtime.step.test_drafts import Drafted, heartbeat
from tests.runtime.test_gpu import GPU_TIE, PROMPTS
from tests.support.engines import assert_same, build, generate, with_few_pages

pytestmark = pytest.mark.gpu

CONFIG: Any = SHAPES["qwen3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**CONFIG, "dtype": "float32"}
    return write_checkpoint(tmp_path_factory.mktemp("gpu") / "model", config, seed=3)


@pytest.fixture(scope="module")
def on_cpu(model: Path) -> list[list[int]]:
    engine = build(model, max_num_seqs=8, debug=False)
    out = generate(engine, PROMPTS, 32)
    engine.close()
    return out


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"enforce_eager": True}, id="eager"),
        pytest.param({}, id="graphs"),
        pytest.param({"max_num_batched_tokens": 40}, id="chunks"),
        pytest.param({"enable_prefix_caching": True}, id="prefix-cache"),
        pytest.param({"prefill_graphs": False}, id="eager-prompts"),
    ],
)
def test_the_cpus_tokens(model: Path, on_cpu: list[list[int]], options: dict[str, Any]) -> None:
    engine = build(model, device="cuda", max_num_seqs=8, **options)
    for _ in range(2):
        got = generate(engine, PROMPTS, 32)
        assert_same(model, PROMPTS, on_cpu, got, GPU_TIE)
    engine.close()


def test_preempted(model: Path, on_cpu: list[list[int]]) -> None:
    engine = build(model, device="cuda", max_num_seqs=8, enable_prefix_caching=True)
    engine = with_few_pages(engine, 30)
    got = generate(engine, PROMPTS, 32)
    assert engine.stats().preemptions > 0
    assert_same(model, PROMPTS, on_cpu, got, GPU_TIE)
    engine.close()


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"enable_prefix_caching": True}])
def test_a_model_that_drafts_for_itself_is_nearly_always_right(
    model: Path, on_cpu: list[list[int]], options: dict[str, Any]
) -> None:
    spec = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3}
    engine = build(model, device="cuda", max_num_seqs=8, speculative_config=spec, **options)
    for _ in range(2):
        assert_same(model, PROMPTS, on_cpu, generate(engine, PROMPTS, 32), GPU_TIE)
    stats = engine.stats()
    assert stats.accepted_per_position[-1] > 0.9 * stats.drafts > 10
    engine.close()


def test_eagle3_drafts_are_those_of_the_cpu(
    model: Path, on_cpu: list[list[int]], tmp_path: Path
) -> None:
    """But where two of its logits nearly tie; and no step waits for the device."""
    same = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size",
    )  # fmt: skip
    shape = {name: CONFIG[name] for name in same}
    drafter, _ = write_eagle3(tmp_path / "drafter", **shape, draft_vocab_size=1000)
    spec = {"method": "eagle3", "model": str(drafter), "num_speculative_tokens": 2}
    drafted: list[set[Drafted]] = []
    for device in ("cpu", "cuda"):
        engine = build(
            model, device=device, max_num_seqs=8, enforce_eager=True, debug=False,
            speculative_config=spec,
        )  # fmt: skip
        seen = heartbeat(engine, 2, [p + o for p, o in zip(PROMPTS, on_cpu, strict=True)])
        assert_same(model, PROMPTS, on_cpu, generate(engine, PROMPTS, 32), GPU_TIE)
        drafted.append(set(seen))
        engine.close()
    known = {one.known: one.drafts for one in drafted[0]}
    both = [one for one in drafted[1] if one.known in known]
    assert sum(one.drafts == known[one.known] for one in both) > 0.9 * len(both) > 50
    engine = build(model, device="cuda", max_num_seqs=8, debug=False, speculative_config=spec)
    generate(engine, PROMPTS, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = generate(engine, PROMPTS, 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(model, PROMPTS, on_cpu, got, GPU_TIE)
    engine.close()


@pytest.mark.parametrize("kv", ["auto", "fp8_e4m3"])
def test_fp8_weights(tmp_path: Path, kv: str) -> None:
    """Graphs bring the tokens of eager steps, but where two logits nearly tie."""
    directory = write_checkpoint(tmp_path, {**CONFIG, "quantization_config": FP8_BLOCKS}, seed=4)
    outputs = []
    for eager in (True, False):
        engine = build(
            directory, device="cuda", dtype="bfloat16", kv_cache_dtype=kv, max_num_seqs=8,
            enforce_eager=eager, debug=False,
        )  # fmt: skip
        outputs.append(generate(engine, PROMPTS, 16))
        engine.close()
    same = sum(a == b for a, b in zip(*outputs, strict=True))
    assert same >= len(PROMPTS) // 2
