"""NVFP4, MXFP4 and mixed checkpoints, against an obvious dequantization of random bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from millrace.kernels.gemm import dequantize_w4
from millrace.model.formats.plain import PlainLinear
from millrace.model.tiny import QWEN3, write_checkpoint
from millrace.model.w4.format import W4Linear
from tests.model.formats.test_int4 import kept, loaded, logits
from tests.support import obvious

ONE_LAYER = {**QWEN3, "num_hidden_layers": 1}


def compressed(kind: str, size: int, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": size}
    group = {"targets": ["Linear"], "weights": weights, "format": f"{kind}-pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-pack-quantized",
        "config_groups": {"group_0": group, **more},
        "ignore": ["lm_head"],
    }


CASES = {
    "compressed": compressed("nvfp4", 16),
    "mx": compressed("mxfp4", 32),
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
}


@pytest.mark.parametrize("kind", CASES)
@torch.inference_mode()
def test_weights_are_the_obvious_ones(tmp_path: Path, kind: str) -> None:
    config = {**ONE_LAYER, "quantization_config": CASES[kind]}
    stored = write_checkpoint(tmp_path, config)
    tensors = load_file(stored / "model.safetensors")
    model, plain = loaded(stored, keep_quantized=True), loaded(stored)
    layers = {"mixer.o_proj": "self_attn.o_proj", "mlp.down_proj": "mlp.down_proj"}
    for ours, theirs in layers.items():
        want = obvious.e2m1(tensors, f"model.layers.0.{theirs}", kind)
        found = plain.get_parameter(f"layers.0.{ours}.weight")
        torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
        assert torch.equal(dequantize_w4(kept(model)[f"layers.0.{ours}"]), found)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_scales_of_any_size_are_exact(tmp_path: Path) -> None:
    """MXFP4's reach beyond float16; a factor of each row brings them into its range."""
    stored = write_checkpoint(tmp_path, {**ONE_LAYER, "quantization_config": CASES["mx"]})
    tensors = load_file(stored / "model.safetensors")
    scales = tensors["model.layers.0.mlp.down_proj.weight_scale"]
    scales[0], scales[1] = 20, 200
    scales[2] = torch.tensor([100, 101, 120])
    save_file(tensors, stored / "model.safetensors")
    want = obvious.e2m1(tensors, "model.layers.0.mlp.down_proj", "mx")
    for keep in (True, False):
        layer = loaded(stored, keep_quantized=keep).layers[0].mlp.down_proj
        found = dequantize_w4(layer.weight) if keep else layer.weight
        assert torch.equal(found, want)


@torch.inference_mode()
def test_parts_of_a_fused_layer_have_their_own_scale(tmp_path: Path) -> None:
    stored = write_checkpoint(tmp_path, {**ONE_LAYER, "quantization_config": CASES["compressed"]})
    tensors = load_file(stored / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_global_scale"] *= 3
    save_file(tensors, stored / "model.safetensors")
    want = [obvious.e2m1(tensors, f"model.layers.0.mlp.{n}_proj", "compressed")
            for n in ("gate", "up")]  # fmt: skip
    layer = loaded(stored, keep_quantized=True).layers[0].mlp.gate_up_proj
    assert isinstance(layer, W4Linear)
    torch.testing.assert_close(dequantize_w4(layer.weight), torch.cat(want), rtol=1e-6, atol=0)


MIXED = {
    "compressed-tensors": compressed(
        "nvfp4", 16,
        group_1={
            "targets": ["re:.*self_attn.*"], "format": "float-quantized",
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
        },
    ),
    "modelopt": {
        "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            f"model.layers.0.{name}_proj": {"quant_algo": "FP8" if "attn" in name else "NVFP4"}
            for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate",
                         "mlp.up")
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("method", MIXED)
@torch.inference_mode()
def test_mixed_checkpoints(tmp_path: Path, method: str) -> None:
    """e4m3 layers are dequantized, those of 4 bits are kept; scales of inputs are not read."""
    stored = write_checkpoint(tmp_path, {**ONE_LAYER, "quantization_config": MIXED[method]})
    tensors = load_file(stored / "model.safetensors")
    o_proj = "model.layers.0.self_attn.o_proj"
    tensors |= {f"{o_proj}.input_scale": torch.ones(()), f"{o_proj}.k_scale": torch.ones(1)}
    save_file(tensors, stored / "model.safetensors")
    model = loaded(stored, keep_quantized=True)
    layer = model.layers[0]
    assert isinstance(layer.mixer.o_proj, PlainLinear)
    assert isinstance(layer.mlp.gate_up_proj, W4Linear)
    assert isinstance(layer.mlp.down_proj, PlainLinear) == (method == "modelopt")
    want = tensors[f"{o_proj}.weight"].float() * tensors[f"{o_proj}.weight_scale"].float()
    assert torch.equal(layer.mixer.o_proj.weight, want)
    torch.testing.assert_close(logits(model), logits(loaded(stored)), rtol=0, atol=1e-4)
