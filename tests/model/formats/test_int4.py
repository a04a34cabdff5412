"""Formats of int4: every weight against an obvious dequantization of random bits; kept, cut, sorted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from millrace.errors import CheckpointError
from millrace.kernels.w4 import W4, dequantize
from millrace.model.build import build_model
from millrace.model.causal_lm import CausalLM
from millrace.model.config import read_config
from millrace.model.formats.plain import PlainLinear
from millrace.model.parallel import TensorParallel
from millrace.model.tiny import QWEN3, QWEN3_MOE, UNIT_TEST, config_json, write_checkpoint
from millrace.model.w4.format import PartsLinear, W4Linear
from millrace.model.weights import load
from tests.support import obvious
from tests.support.driver import Driver, allocate_caches

IDS = [(7 * i + i * i) % 320 for i in range(60)]
ONE_LAYER = {**QWEN3, "num_hidden_layers": 1}
Obvious = Callable[[dict[str, Tensor], str], Tensor]


def gptq(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True} | changes


def packed(group: int, **weights: Any) -> dict[str, Any]:
    strategy = "channel" if group < 0 else "group"
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": strategy}
    args |= {"group_size": None if group < 0 else group} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}},
        "ignore": ["lm_head", "re:.*o_proj"],
    }


def auto_round(packing: str, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True,
        "packing_format": f"auto_round:{packing}",
    } | changes  # fmt: skip


CASES: dict[str, tuple[dict[str, Any], Obvious]] = {
    "gptq": (gptq(), lambda t, m: obvious.gptq(t, m, group=32)),
    "gptq all": (gptq(group_size=-1), lambda t, m: obvious.gptq(t, m, group=1 << 20)),
    "gptq asymmetric": (gptq(sym=False), lambda t, m: obvious.gptq(t, m, group=32)),
    "gptq v2": (
        gptq(sym=False, checkpoint_format="gptq_v2"),
        lambda t, m: obvious.gptq(t, m, v1=False, group=32),
    ),
    "gptq desc_act": (gptq(sym=False, desc_act=True), obvious.gptq),
    "gptq 64, desc_act": (gptq(group_size=64, desc_act=True), obvious.gptq),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        lambda t, m: obvious.awq(t, m, 32),
    ),
    "auto-round, gptq": (auto_round("auto_gptq"), lambda t, m: obvious.gptq(t, m, group=32)),
    "auto-round, awq": (
        auto_round("auto_awq", sym=False, group_size=64), lambda t, m: obvious.awq(t, m, 64)
    ),
}  # fmt: skip


def loaded(directory: Path, **options: Any) -> CausalLM:
    options = {"dtype": torch.float32, **options}
    model = build_model(read_config(directory), **options)
    load(model, directory)
    return model


def logits(model: CausalLM) -> Tensor:
    driver = Driver(model, allocate_caches(model, 1, 40))
    driver.admit(1)
    hidden = [driver.step(prefill=[(1, IDS[:41])])[1][0]]
    for token in IDS[41:]:
        hidden += driver.step(decode=[(1, [token])])[0]
        driver.accept(1, 1, 1)
    return model.logits(torch.cat(hidden))


def modules(tensors: dict[str, Tensor]) -> list[str]:
    marks = (".scales", ".weight_scale")
    return [name.removesuffix(m) for name in tensors for m in marks if name.endswith(m)]


def twin(directory: Path, target: Path, config: dict[str, Any], dequantized: Obvious) -> Path:
    """The same checkpoint with plain weights, dequantized the obvious way."""
    write_checkpoint(target, {k: v for k, v in config.items() if k != "quantization_config"})
    tensors = load_file(directory / "model.safetensors")
    found = {name: t for name, t in tensors.items() if name.endswith((".weight", "A_log", "bias"))}
    for module in modules(tensors):
        found[f"{module}.weight"] = dequantized(tensors, module)
    save_file(found, target / "model.safetensors", metadata={"format": "pt"})
    return target


def kept(model: nn.Module) -> dict[str, W4]:
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, W4Linear)}


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_weights_are_the_obvious_ones(tmp_path: Path, case: str) -> None:
    """Dequantized at load, each weight is bit for bit what its definition says; kept, too."""
    entries, dequantized = CASES[case]
    config = {**ONE_LAYER, "quantization_config": entries}
    stored = write_checkpoint(tmp_path / "stored", config)
    plain = loaded(twin(stored, tmp_path / "plain", config, dequantized))
    for (name, found), want in zip(
        loaded(stored).named_parameters(), plain.parameters(), strict=True
    ):
        assert torch.equal(found, want), name
    model = loaded(stored, keep_quantized=True)
    assert len(kept(model)) >= 3
    if not entries.get("desc_act"):
        for name, weight in kept(model).items():
            assert torch.equal(dequantize(weight), plain.get_parameter(f"{name}.weight")), name
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-4)
