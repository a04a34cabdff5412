"""Qwen3 dense on a GPU: the CPU's tokens, in the same graphs; FP8 weights that stay FP8.

The CPU twins of these tests are in test_qwen3.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from millrace.model.tiny import FP8_BLOCKS, SHAPES, write_checkpoint
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
