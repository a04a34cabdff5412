"""`millrace quantize`: what is written is what loaders read, and what stays plain is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from millrace import cli
from millrace.errors import ConfigError
from millrace.kernels.gemm import dequantize_w4
from millrace.model.config import read_config
from millrace.model.formats.fp8_block import Fp8BlockLinear
from millrace.model.tiny import (
    QWEN3,
    UNIT_TEST,
    config_json,
    moe_config_json,
    write_checkpoint,
)
from millrace.model.w4.format import W4Linear
from millrace.quantize import checkpoint
from millrace.quantize.checkpoint import Target, quantize_checkpoint
from millrace.quantize.rounding import round_int4
from tests.model.formats.test_int4 import loaded, logits

IDS = [[(7 * i + i * i) % 320 for i in range(50)]]


@pytest.mark.parametrize("nested", [False, True])
@torch.inference_mode()
def test_int4(tmp_path: Path, nested: bool) -> None:
    """Each weight is its rounded one; small projections and the draft head stay as they are."""
    source = write_checkpoint(tmp_path / "source", UNIT_TEST, nested=nested)
    found = quantize_checkpoint(source, tmp_path / "out", Target("int4", 32))
    plain, model = loaded(source, mtp=True), loaded(tmp_path / "out", mtp=True, keep_quantized=True)
    down = model.layers[0].mlp.down_proj
    assert isinstance(down, W4Linear)
    want = round_int4(plain.layers[0].mlp.down_proj.weight, 32).dequantize()
    assert torch.equal(dequantize_w4(down.weight), want)
    assert found.layers == 3 * 3 + 4 + 4 * 3
    assert 0.05 < found.error < 0.15
    assert found.after < found.before
    for name in ("embedding.weight", "layers.0.mixer.in_proj_ab.weight", "mtp.fc.weight",
                 "mtp.layer.mlp.down_proj.weight"):  # fmt: skip
        assert torch.equal(model.get_parameter(name), plain.get_parameter(name)), name
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    stem = "model.language_model" if nested else "model"
    assert f"{stem}.layers.0.linear_attn.in_proj_a" in entries["ignore"]
    assert "mtp.fc" in entries["ignore"]
    assert (tmp_path / "out" / "tokenizer.json").exists()


@torch.inference_mode()
def test_fp8(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", config_json(UNIT_TEST))
    found = quantize_checkpoint(source, tmp_path / "out", Target("fp8"))
    assert found.error < 0.04
    config = read_config(tmp_path / "out")
    assert config.quantization.method == "fp8"
    model = loaded(tmp_path / "out", keep_quantized=True)
    assert isinstance(model.layers[0].mlp.down_proj, Fp8BlockLinear)
    pairs = zip(loaded(tmp_path / "out").parameters(), loaded(source).parameters(), strict=True)
    assert all((got - want).norm() <= 0.04 * want.norm() for got, want in pairs)


@pytest.mark.parametrize("to", ["int4", "fp8"])
@torch.inference_mode()
def test_experts_in_one_tensor_become_one_by_one(tmp_path: Path, to: str) -> None:
    """Files of several shards, with an index."""
    source = write_checkpoint(tmp_path / "source", moe_config_json(), fused=True, nested=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SHARD", 100_000)
        quantize_checkpoint(source, tmp_path / "out", Target(to, 16))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    end = "weight_packed" if to == "int4" else "weight_scale_inv"
    name = f"model.language_model.layers.1.mlp.experts.2.gate_proj.{end}"
    assert name in load_file(tmp_path / "out" / index["weight_map"][name])
    assert "model.language_model.layers.1.mlp.gate.weight" in index["weight_map"]
    pairs = zip(loaded(tmp_path / "out").parameters(), loaded(source).parameters(), strict=True)
    assert all((got - want).norm() <= 0.12 * want.norm() for got, want in pairs)


def mean_error(source: Path, out: Path) -> float:
    got, want = logits(loaded(out)), logits(loaded(source))
    return float((got - want).norm() / want.norm())


@torch.inference_mode()
def test_calibration_keeps_the_outputs(tmp_path: Path) -> None:
    """On the text that was read, GPTQ is nearer than rounding to the nearest."""
    source = write_checkpoint(tmp_path / "source", {**QWEN3, "num_hidden_layers": 2})
    prompts = [[(k * i + i * i) % 320 for i in range(60)] for k in range(1, 8)]
    quantize_checkpoint(source, tmp_path / "gptq", Target("int4", 32, prompts))
    quantize_checkpoint(source, tmp_path / "nearest", Target("int4", 32))
    assert mean_error(source, tmp_path / "gptq") < mean_error(source, tmp_path / "nearest")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "source", {**QWEN3, "num_hidden_layers": 1})
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("A text that the model reads. " * 20)
    options = ["--to", "int4", "--group-size", "32", "--calibration", str(text)]
    assert cli.run(["quantize", str(source), *options, "--out", str(out)]) == 0
    assert "7 layers quantized" in capsys.readouterr().out
    assert read_config(out).quantization.method == "compressed-tensors"

    refusals: list[tuple[list[str], str]] = [
        ([str(out), "--to", "fp8", "--out", str(tmp_path / "x")], "is quantized already"),
        ([str(source), "--to", "fp8", "--out", str(out)], "not empty; give another --out"),
        ([str(source), "--to", "int4", "--group-size", "20"], "use a multiple of 8"),
        ([str(source), "--to", "fp8", "--calibration", str(text)], "leave it out"),
        ([str(source), "--to", "int4", "--group-size", "4096"], "give a smaller --group-size"),
    ]
    for arguments, message in refusals:
        assert cli.run(["quantize", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_nothing_is_written_when_it_cannot_be(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {**QWEN3, "num_hidden_layers": 1})
    target: Any = Target("int4", 4096)
    with pytest.raises(ConfigError):
        quantize_checkpoint(source, tmp_path / "out", target)
    assert not (tmp_path / "out").exists()
