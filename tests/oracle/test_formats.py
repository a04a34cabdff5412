"""The form of a checkpoint does not change its results: FP8, nested names, YaRN."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from millrace.kernels.gemm import dequantize
from millrace.kernels.quantize import quantize
from millrace.model.build import build_model
from millrace.model.causal_lm import CausalLM
from millrace.model.config import read_config
from millrace.model.formats.fp8_block import Fp8BlockLinear
from millrace.model.tiny import UNIT_TEST, TinyShape, write_checkpoint
from millrace.model.weights import load
from tests.support.driver import Driver, allocate_caches

IDS = [(7 * i + i * i) % 320 for i in range(150)]
FP8_SHAPE = TinyShape(
    hidden_size=192,  # 1.5 blocks
    intermediate_size=320,
    num_layers=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    key_heads=1,
    value_heads=3,
    key_dim=64,
    value_dim=64,
    vocab_size=320,
    fp8=True,
    dtype="float32",
)


def ours(directory: Path, **options: Any) -> CausalLM:
    model = build_model(read_config(directory), dtype=torch.float32, mtp=True, **options)
    load(model, directory)
    return model


def logits(model: CausalLM) -> torch.Tensor:
    driver = Driver(model, allocate_caches(model, 1, 40))
    driver.admit(1)
    _, [hidden] = driver.step(prefill=[(1, IDS)])
    return model.logits(hidden)


@torch.inference_mode()
def reference(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model(torch.tensor([IDS]), use_cache=False).logits[0]


def test_nested_and_sharded_is_flat(tmp_path: Path) -> None:
    flat = write_checkpoint(tmp_path / "flat", UNIT_TEST)
    nested = write_checkpoint(tmp_path / "nested", UNIT_TEST, nested=True, files=3)
    torch.testing.assert_close(logits(ours(nested)), logits(ours(flat)), rtol=0, atol=0)


def test_fp8_equals_its_dequantised_weights(tmp_path: Path) -> None:
    """Each weight is its e4m3 value times the scale of its 128 x 128 block, written out here."""
    fp8 = write_checkpoint(tmp_path / "fp8", FP8_SHAPE)
    plain = write_checkpoint(tmp_path / "plain", dataclasses.replace(FP8_SHAPE, fp8=False))
    stored = load_file(fp8 / "model.safetensors")
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        full = tensor.float()
        if tensor.dtype == torch.float8_e4m3fn:
            scale = stored[name + "_scale_inv"]
            for i in range(0, full.shape[0], 128):
                for j in range(0, full.shape[1], 128):
                    full[i : i + 128, j : j + 128] *= scale[i // 128, j // 128]
        tensors[name] = full
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    quantized = sum(t.dtype == torch.float8_e4m3fn for t in stored.values())
    assert quantized == 3 * 6 + 7 + 7  # three GDN layers, one attention layer, the draft head
    result = logits(ours(fp8))
    torch.testing.assert_close(result, logits(ours(plain)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result, reference(plain), rtol=0, atol=1e-4)


def test_fp8_weights_equal_dequantized_ones(tmp_path: Path) -> None:
    """Weights that stay e4m3, fused and reordered block by block, are the same weights.

    Their products differ by the rounding of the activations to e4m3 alone.
    """
    shape = dataclasses.replace(
        FP8_SHAPE, hidden_size=256, intermediate_size=384, head_dim=128, key_dim=128, value_dim=128
    )
    directory = write_checkpoint(tmp_path, shape)
    kept = ours(directory, keep_quantized=True)
    plain = ours(directory)
    pairs = [
        (a, b)
        for a, b in zip(kept.modules(), plain.modules(), strict=True)
        if isinstance(a, Fp8BlockLinear)
    ]
    assert len(pairs) > 10
    for a, b in pairs:
        assert torch.equal(dequantize(a.weight, a.weight_scale_inv), b.weight)
        x = torch.randn(7, b.weight.shape[1])
        assert torch.equal(a(x), b(x))
        rounded = a(quantize(x))
        assert 1e-3 < (rounded - b(x)).norm() / b(x).norm() < 0.04


def test_yarn(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, UNIT_TEST)
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] |= {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    (directory / "config.json").write_text(json.dumps(config))
    scaling = read_config(directory).rope_scaling
    assert scaling is not None
    assert scaling.factor == 4.0
    plain = reference(write_checkpoint(tmp_path / "plain", UNIT_TEST))
    stretched = reference(directory)
    assert (stretched - plain).abs().max() > 0.01
    torch.testing.assert_close(logits(ours(directory)), stretched, rtol=0, atol=1e-4)
