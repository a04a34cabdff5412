"""Mixtures of experts: in float32 the logits are those of `transformers`, for any shape."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from millrace.kernels.moe import ExpertWeights, route, run_experts
from millrace.model.build import build_model
from millrace.model.causal_lm import CausalLM
from millrace.model.config import read_config
from millrace.model.drafters.mtp import MTPHead
from millrace.model.layers.norm import NormedInput
from millrace.model.tiny import (
    FP8_BLOCKS,
    QWEN3_MOE,
    UNIT_TEST,
    moe_config_json,
    write_checkpoint,
)
from millrace.model.weights import load
from tests.oracle.conftest import MakePair, random_shape
from tests.oracle.test_forward import assert_as_near_as_transformers, assert_close, decode
from tests.oracle.test_qwen3 import random_config
from tests.support.driver import Driver, allocate_caches, make_batch


def random_experts(rng: random.Random) -> dict[str, Any]:
    count = rng.choice([4, 5, 8, 16, 64])
    return {
        "num_experts": count,
        "num_experts_per_tok": rng.randint(1, min(8, count)),
        "moe_intermediate_size": rng.choice([8, 24, 40]),
    }


def without_shared_expert(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    config = {**QWEN3_MOE, **random_config(seed), **random_experts(rng)}
    return config | {
        "architectures": QWEN3_MOE["architectures"],
        "model_type": QWEN3_MOE["model_type"],
        "norm_topk_prob": seed % 5 > 0,
        "decoder_sparse_step": 1 + seed % 2,
        "mlp_only_layers": [0] if seed % 4 == 3 else [],
    }


def with_shared_expert(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    config = {**moe_config_json(random_shape(seed)), **random_experts(rng)}
    return config | {"shared_expert_intermediate_size": rng.choice([8, 33, 64])}


NEXT = {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}


def qwen3_next(seed: int) -> dict[str, Any]:
    """As above, with the recurrent layers' projections in two tensors."""
    return {**with_shared_expert(seed), **NEXT}


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(make_pair: MakePair, seed: int) -> None:
    """Prefill in two chunks of any size, then rows of one or several tokens, some rejected.

    The reference is float64: of some shapes, both models are 7e-5 away from it in float32.
    """
    rng = random.Random(seed)
    kind = (without_shared_expert, with_shared_expert, qwen3_next)[seed % 3]
    config = kind(seed)
    pair = make_pair(config, seed=seed, reference_dtype=torch.float64)
    drafts = seed % 6
    ids = pair.ids(rng.randint(90, 120), seed)
    cut, prompt = sorted(rng.sample(range(1, 80), 2))
    driver, reference = pair.driver(drafts=drafts), pair.reference(ids)
    for start, stop in ((0, cut), (cut, prompt)):
        _, [hidden] = driver.step(prefill=[(2, ids[start:stop])])
        assert_close(pair, hidden, reference[start:stop])
    decode(pair, driver, 2, ids, drafts, rng)


def test_most_experts_get_no_token(make_pair: MakePair) -> None:
    """Each token goes to one of two experts that are far apart."""
    config = {**moe_config_json(), "num_experts": 16, "num_experts_per_tok": 1}
    pair = make_pair(config, seed=20)
    weights = torch.zeros(16, UNIT_TEST.hidden_size)
    weights[3] = torch.randn(UNIT_TEST.hidden_size, generator=torch.Generator().manual_seed(0))
    weights[14] = -weights[3]
    seen: list[Tensor] = []
    for layer, other in zip(pair.model.layers, pair.reference_model.model.layers, strict=True):
        layer.mlp.router.weight.data.copy_(weights)
        other.mlp.gate.weight.data.copy_(weights)
        layer.mlp.router.register_forward_hook(lambda _, given, out: seen.append(out.argmax(-1)))
    ids, driver = pair.ids(40), pair.driver()
    _, [hidden] = driver.step(prefill=[(1, ids)])
    assert_close(pair, hidden, pair.reference(ids))
    assert set(torch.cat(seen).tolist()) == {3, 14}


@torch.inference_mode()
@pytest.mark.parametrize("top_k", [1, 4])
def test_all_tokens_go_to_the_same_experts(make_pair: MakePair, top_k: int) -> None:
    config = {**moe_config_json(), "num_experts_per_tok": top_k}
    pair = make_pair(config, seed=21)
    ours, theirs = pair.model.layers[0].mlp, pair.reference_model.model.layers[0].mlp
    slopes = torch.tensor([0.1, -0.3, 0.5, 0.2, -0.1, 0.3, 0.0, 0.4])
    weights = slopes[:, None].expand(8, UNIT_TEST.hidden_size)
    ours.router.weight.data.copy_(weights)
    theirs.gate.weight.data.copy_(weights)
    x = torch.rand(30, UNIT_TEST.hidden_size, generator=torch.Generator().manual_seed(1))
    assert set(theirs.gate(x)[2].flatten().tolist()) == set([2, 7, 5, 3][:top_k])
    expected = theirs(x.unsqueeze(0))[0]
    _, batch = make_batch(pair.driver().caches, torch.tensor([0, 0]), [], [(1, pair.ids(30))])
    torch.testing.assert_close(ours(NormedInput(x, None), batch), expected, rtol=0, atol=1e-4)


# --- forms of checkpoints ----------------------------------------------------------------------

FP8 = {
    **moe_config_json(dataclasses.replace(UNIT_TEST, hidden_size=128)),
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "num_experts": 4,
    "quantization_config": FP8_BLOCKS,
}  # fmt: skip
IDS = [(7 * i + i * i) % 320 for i in range(60)]


def loaded(directory: Path, keep: bool = False) -> tuple[CausalLM, Tensor]:
    """The model, and its logits after IDS."""
    config = read_config(directory)
    model = build_model(config, dtype=torch.float32, mtp=True, keep_quantized=keep)
    load(model, directory)
    driver = Driver(model, allocate_caches(model, 1, 40))
    driver.admit(1)
    _, [hidden] = driver.step(prefill=[(1, IDS)])
    return model, model.logits(hidden)


def experts_of(model: CausalLM) -> list[ExpertWeights]:
    assert isinstance(model.mtp, MTPHead)
    found = [layer.mlp.experts for layer in [*model.layers, model.mtp.layer]]
    return [weights for experts in found for weights in (experts.gate_up, experts.down)]


@pytest.mark.parametrize("config", [QWEN3_MOE, moe_config_json()], ids=["qwen3", "qwen3_5"])
def test_fused_nested_and_sharded_is_the_same(tmp_path: Path, config: dict[str, Any]) -> None:
    _, expected = loaded(write_checkpoint(tmp_path / "each", config))
    _, fused = loaded(write_checkpoint(tmp_path / "fused", config, fused=True))
    nested = config["model_type"] != "qwen3_moe"
    _, sharded = loaded(write_checkpoint(tmp_path / "nested", config, nested=nested, files=3))
    assert torch.equal(fused, expected)
    assert torch.equal(sharded, expected)


@pytest.mark.parametrize("fused", [False, True])
def test_fp8_experts(tmp_path: Path, fused: bool) -> None:
    """Weights that stay e4m3 are the dequantized ones, whether or not the checkpoint fuses them."""
    plain, _ = loaded(write_checkpoint(tmp_path / "each", FP8))
    kept, _ = loaded(write_checkpoint(tmp_path / "form", FP8, fused=fused), keep=True)
    for a, b in zip(experts_of(kept), experts_of(plain), strict=True):
        assert (a.values.dtype, b.scales) == (torch.float8_e4m3fn, None)
        for expert in range(4):
            assert torch.equal(a.of(expert, torch.float32), b.values[expert])
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(0))
    for a, b in zip(kept.layers, plain.layers, strict=True):
        routes = route(a.mlp.router(x), 3, True)
        both = [run_experts(x, routes, m.mlp.experts.gate_up, m.mlp.experts.down) for m in (a, b)]
        torch.testing.assert_close(both[0], both[1], rtol=1e-5, atol=1e-6)


def test_experts_of_both_formats_are_dequantized(tmp_path: Path) -> None:
    """Each expert has the format that config.json says."""
    skipped = ["model.layers.0.mlp.experts.2", "mtp.layers.0.mlp.experts"]
    config = {**FP8, "quantization_config": {**FP8_BLOCKS, "modules_to_not_convert": skipped}}
    kept, _ = loaded(write_checkpoint(tmp_path, config), keep=True)
    dtypes = [weights.values.dtype for weights in experts_of(kept)]
    assert dtypes == [torch.float32] * 2 + [torch.float8_e4m3fn] * 6 + [torch.float32] * 2


def test_bfloat16_log_probabilities(make_pair: MakePair) -> None:
    """In bfloat16 we are as near to the float32 reference as `transformers` in bfloat16 is."""
    shape = dataclasses.replace(UNIT_TEST, dtype="bfloat16", hidden_size=128)
    config = {**moe_config_json(shape), "num_experts": 16, "moe_intermediate_size": 64}
    pair, exact = make_pair(config, dtype=torch.bfloat16), make_pair(config)
    ids = pair.ids(200)
    driver = pair.driver(tokens=200)
    hidden = [driver.step(prefill=[(1, ids[:150])])[1][0]]
    for start in range(150, 200):
        hidden += driver.step(decode=[(1, ids[start : start + 1])])[0]
        driver.accept(1, 1, 1)
    assert_as_near_as_transformers(pair, exact, ids, torch.cat(hidden))
