"""Weights of 4 bits against `transformers`, which has compressed-tensors dequantize them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from millrace.model.tiny import QWEN3, UNIT_TEST, write_checkpoint
from millrace.quantize.checkpoint import Target, quantize_checkpoint
from tests.model.formats.test_fp4 import CASES as FP4_CASES
from tests.model.formats.test_int4 import CASES, loaded
from tests.oracle.test_formats import logits

IDS = [(7 * i + i * i) % 320 for i in range(150)]
MANY_GROUPS = {**QWEN3, "num_hidden_layers": 2}
COMPRESSED = {"quantization_status": "compressed"}


@torch.inference_mode()
def reference(directory: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    return model(torch.tensor([IDS]), use_cache=False).logits[0].float()


def check(directory: Path) -> None:
    want = reference(directory)
    for keep in (True, False):
        model = loaded(directory, keep_quantized=keep)
        torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [UNIT_TEST, MANY_GROUPS], ids=["qwen3_5", "qwen3"])
@torch.inference_mode()
def test_what_millrace_writes_is_read_by_others(tmp_path: Path, shape: Any) -> None:
    source = write_checkpoint(tmp_path / "source", shape)
    quantize_checkpoint(source, tmp_path / "int4", Target("int4", 32))
    check(tmp_path / "int4")


@pytest.mark.parametrize("case", ["", ", channel"])
@torch.inference_mode()
def test_random_bits(tmp_path: Path, case: str) -> None:
    entries = CASES[f"compressed-tensors{case}"][0] | COMPRESSED
    check(write_checkpoint(tmp_path, {**MANY_GROUPS, "quantization_config": entries}))


@torch.inference_mode()
def test_random_bits_with_zeros(tmp_path: Path) -> None:
    """`transformers` expects their zeros unpacked; so the package unpacks them here itself."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    entries = CASES["compressed-tensors, asymmetric"][0]
    stored = write_checkpoint(tmp_path, {**MANY_GROUPS, "quantization_config": entries})
    tensors, layer = load_file(stored / "model.safetensors"), "model.layers.1.mlp.down_proj"
    packed, zeros, scales = (
        tensors[f"{layer}.weight_{name}"] for name in ("packed", "zero_point", "scale")
    )
    values = unpack_from_int32(packed, 4, torch.Size((64, 96)), packed_dim=1)
    nought = unpack_from_int32(zeros, 4, torch.Size((64, 3)), packed_dim=0)
    want = (values - nought.repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1)
    assert torch.equal(loaded(stored).layers[1].mlp.down_proj.weight, want)


@torch.inference_mode()
def test_random_bits_of_nvfp4(tmp_path: Path) -> None:
    """The package dequantizes to bfloat16 alone, so logits differ by its rounding."""
    entries = FP4_CASES["compressed"] | COMPRESSED
    directory = write_checkpoint(tmp_path, {**MANY_GROUPS, "quantization_config": entries})
    want = reference(directory, torch.bfloat16)
    found = logits(loaded(directory, keep_quantized=True))
    assert (found - want).norm() < 0.03 * want.norm()
