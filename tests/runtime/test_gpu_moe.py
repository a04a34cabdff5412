"""Mixtures of experts on a GPU: the CPU's tokens, in the same graphs; FP8 experts that stay FP8.

The CPU twins of these tests are in test_moe.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.model.layers.moe import Experts
from millrace.model.tiny import (
    FP8_BLOCKS,
    QWEN3_MOE,
    TinyShape,
    moe_config_json,
    write_checkpoint,
)
from tests.runtime.test_gpu import GPU_TIE, PROMPTS, mtp
from tests.support.engines import assert_same, build, generate, with_few_pages

pytestmark = pytest.mark.gpu

SMALL: Any = {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 2048}
SHAPE = TinyShape(num_layers=4, dtype="float32")
KINDS: dict[str, Any] = {
    "qwen3_moe": {**QWEN3_MOE, **SMALL, "num_experts": 16},
    "qwen3_5_moe": moe_config_json(SHAPE),
    "qwen3_next": moe_config_json(SHAPE)
    | {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"},
}
WIDE: Any = {
    "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "num_experts": 16,
    "quantization_config": FP8_BLOCKS,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("gpu")
    return {
        kind: write_checkpoint(directory / kind, config, seed=3) for kind, config in KINDS.items()
    }


@pytest.fixture(scope="module")
def on_cpu(models: dict[str, Path]) -> dict[str, list[list[int]]]:
    found = {}
    for kind, model in models.items():
        engine = build(model, max_num_seqs=8, debug=False)
        found[kind] = generate(engine, PROMPTS, 24)
        engine.close()
    return found


CACHED = {"enable_prefix_caching": True}
OPTIONS = [
    ("qwen3_moe", {"enforce_eager": True}),
    ("qwen3_moe", {"max_num_batched_tokens": 40, **CACHED}),
    ("qwen3_5_moe", {}),
    ("qwen3_5_moe", {"prefill_graphs": False, **CACHED}),
    ("qwen3_5_moe", mtp(1)),
    ("qwen3_5_moe", mtp(3, max_num_batched_tokens=100, **CACHED)),
    ("qwen3_next", {}),
    ("qwen3_next", mtp(2)),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_the_cpus_tokens(
    models: dict[str, Path], on_cpu: dict[str, list[list[int]]], kind: str, options: dict[str, Any]
) -> None:
    engine = build(models[kind], device="cuda", max_num_seqs=8, **options)
    for _ in range(2):
        got = generate(engine, PROMPTS, 24)
        assert_same(models[kind], PROMPTS, on_cpu[kind], got, GPU_TIE)
    engine.close()


def test_preempted(models: dict[str, Path], on_cpu: dict[str, list[list[int]]]) -> None:
    model = models["qwen3_5_moe"]
    engine = with_few_pages(build(model, device="cuda", max_num_seqs=8, **mtp(2)), 30)
    got = generate(engine, PROMPTS, 24)
    assert engine.stats().preemptions > 0
    assert_same(model, PROMPTS, on_cpu["qwen3_5_moe"], got, GPU_TIE)
    engine.close()


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Any wait of the host for the device is an error, except where a result is due."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("eager", [True, False])
def test_no_step_waits_for_the_device(models: dict[str, Path], eager: bool, no_sync: None) -> None:
    """Counts of experts' tokens among them."""
    engine = build(
        models["qwen3_5_moe"], device="cuda", max_num_seqs=8, enforce_eager=eager, debug=False
    )
    generate(engine, PROMPTS, 8)
    torch.cuda.set_sync_debug_mode("error")
    generate(engine, PROMPTS, 8)
    torch.cuda.set_sync_debug_mode("default")
    engine.close()


@pytest.mark.parametrize("options", [{}, mtp(2)], ids=["alone", "mtp-2"])
def test_fp8_experts(tmp_path: Path, options: dict[str, Any]) -> None:
    """They stay e4m3, and graphs bring the tokens of eager steps, but where two logits nearly
    tie."""
    shape = TinyShape(num_layers=4)
    directory = write_checkpoint(tmp_path, {**moe_config_json(shape), **WIDE}, seed=4)
    outputs = []
    for eager in (True, False):
        engine = build(
            directory, device="cuda", dtype="bfloat16", kv_cache_dtype="fp8_e4m3", max_num_seqs=8,
            enforce_eager=eager, debug=False, **options,
        )  # fmt: skip
        experts = [m for m in engine.worker.model.modules() if isinstance(m, Experts)]
        assert experts
        assert all(m.gate_up_values.dtype == torch.float8_e4m3fn for m in experts)
        outputs.append(generate(engine, PROMPTS, 16))
        engine.close()
    same = sum(a == b for a, b in zip(*outputs, strict=True))
    assert same >= len(PROMPTS) // 2
