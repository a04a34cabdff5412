"""Formats of int4: weights against an obvious dequantization of random bits; rules, and ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from millrace.errors import CheckpointError
from millrace.kernels.cpu.w4 import is_supported
from millrace.kernels.gemm import W4, dequantize_w4
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
from tests.support.engines import run

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
    "auto-round, gptqmodel": (
        auto_round("gptqmodel", sym=False), lambda t, m: obvious.gptq(t, m, v1=False, group=32)
    ),
    "auto-round, awq": (
        auto_round("auto_awq", sym=False, group_size=64), lambda t, m: obvious.awq(t, m, 64)
    ),
    "compressed-tensors": (packed(32), lambda t, m: obvious.pack_quantized(t, m, 32)),
    "compressed-tensors, channel": (
        packed(-1), lambda t, m: obvious.pack_quantized(t, m, 1 << 20)
    ),
    "compressed-tensors, asymmetric": (
        packed(32, symmetric=False), lambda t, m: obvious.pack_quantized(t, m, 32)
    ),
    "compressed-tensors, actorder": (
        packed(32, actorder="group"), lambda t, m: obvious.pack_quantized(t, m, 32)
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
    if not entries.get("desc_act") and "actorder" not in case:
        for name, weight in kept(model).items():
            assert torch.equal(dequantize_w4(weight), plain.get_parameter(f"{name}.weight")), name
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-4)


def test_tokens_are_those_of_the_dequantized_twin(tmp_path: Path) -> None:
    """In bfloat16, where weights are unpacked as they are multiplied, in prompts and in answers."""
    if not is_supported():
        pytest.skip("no compiled function on this processor")
    config = {**QWEN3, "num_hidden_layers": 2, "dtype": "bfloat16"}
    config["quantization_config"] = CASES["gptq asymmetric"][0]
    stored = write_checkpoint(tmp_path / "stored", config)
    plain = twin(stored, tmp_path / "plain", config, CASES["gptq asymmetric"][1])
    options: dict[str, Any] = {"dtype": "bfloat16", "max_num_batched_tokens": 29}
    prompts = [IDS[:n] for n in (3, 20, 55)]
    found, want = (run(directory, prompts, **options)[0] for directory in (stored, plain))
    assert found == want


# --- which layers -------------------------------------------------------------------------------


def test_rules_of_gptq_decide_by_layer(tmp_path: Path) -> None:
    """`dynamic` leaves layers out or changes them; names are those of `transformers`."""
    entries = gptq(dynamic={"-:.*mlp.down.*": {}, r"+:.*\.1\.mlp.*": {"group_size": 16}})
    config = {**QWEN3, "num_hidden_layers": 2, "quantization_config": entries}
    model = loaded(write_checkpoint(tmp_path, config), keep_quantized=True)
    found = {name: weight.group for name, weight in kept(model).items()}
    assert found == {
        "layers.0.mixer.qkv_proj": 32, "layers.0.mixer.o_proj": 32, "layers.0.mlp.gate_up_proj": 32,
        "layers.1.mixer.qkv_proj": 32, "layers.1.mixer.o_proj": 32, "layers.1.mlp.gate_up_proj": 16,
    }  # fmt: skip


def test_rules_of_auto_round_decide_by_layer(tmp_path: Path) -> None:
    own = {"model.layers.0.mlp.down_proj": {"bits": 16}, r".*o_proj": {"group_size": 64}}
    entries = auto_round("auto_gptq", extra_config=own, block_name_to_quantize="model.layers")
    config = {**ONE_LAYER, "quantization_config": entries}
    found = kept(loaded(write_checkpoint(tmp_path, config), keep_quantized=True))
    assert {name.rpartition(".")[2]: weight.group for name, weight in found.items()} == {
        "qkv_proj": 32, "o_proj": 64, "gate_up_proj": 32,
    }  # fmt: skip


@torch.inference_mode()
def test_the_files_decide_where_they_differ_from_the_rules(tmp_path: Path) -> None:
    """Quantizers leave layers out without saying so, and quantize some that others never do."""
    config = {**config_json(UNIT_TEST), "quantization_config": gptq(group_size=16)}
    stored = write_checkpoint(tmp_path, config)
    before = logits(loaded(stored))
    tensors = load_file(stored / "model.safetensors")
    out = "model.layers.0.linear_attn.out_proj"
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        tensors.pop(f"{out}.{name}", None)
    tensors[f"{out}.weight"] = torch.zeros(64, 64)
    save_file(tensors, stored / "model.safetensors")
    model = loaded(stored, keep_quantized=True)
    assert isinstance(model.layers[0].mixer.out_proj, PlainLinear)
    assert not torch.equal(logits(model), before)

    small = "model.layers.0.linear_attn.in_proj_a"
    del tensors[f"{small}.weight"]
    tensors |= {
        f"{small}.qweight": torch.full((8, 4), 0x77777777, dtype=torch.int32),
        f"{small}.qzeros": torch.full((4, 1), 0x77777777, dtype=torch.int32),
        f"{small}.scales": torch.full((4, 4), 0.5),
    }
    save_file(tensors, stored / "model.safetensors")
    weight = loaded(stored).layers[0].mixer.in_proj_ab.weight
    assert torch.equal(weight[:4], torch.full((4, 64), -0.5))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (gptq(bits=8), "'gptq' with 8 bits cannot be run; 4 bits can"),
        (gptq(group_size=20), "group_size 20 cannot be run; -1 and multiples of 8"),
        (gptq(checkpoint_format="marlin"), "checkpoint_format 'marlin' cannot be run; gptq and"),
        (gptq(dynamic={"+:.*down.*": {"bits": 8}}), r"layer \S*down_proj: GPTQ with 8 bits"),
        (gptq(dynamic={"-:*": {}}), "no regular expression"),
        (CASES["awq"][0] | {"version": "gemv"}, "version 'gemv' cannot be run; gemm can"),
        (auto_round("fp8"), "packing_format 'auto_round:fp8' cannot be run; auto_round:auto_gptq"),
        (packed(32, num_bits=8), "group 'group_0' .8 bits of int.*cannot be run"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ' cannot"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' cannot be run; .*awq.*engine vllm"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        write_checkpoint(tmp_path, {**ONE_LAYER, "quantization_config": entries})
    assert "\n" not in str(error.value)


def test_groups_in_another_order_than_said_are_refused(tmp_path: Path) -> None:
    entries = gptq(desc_act=True)
    stored = write_checkpoint(tmp_path, {**ONE_LAYER, "quantization_config": entries})
    path = stored / "config.json"
    path.write_text(path.read_text().replace('"desc_act": true', '"desc_act": false'))
    with pytest.raises(CheckpointError, match=r"_proj: its g_idx has columns in another order"):
        loaded(stored)


# --- experts, ranks -----------------------------------------------------------------------------


@torch.inference_mode()
def test_experts(tmp_path: Path) -> None:
    """Named one by one; the router is plain whatever the rules say."""
    config = {**QWEN3_MOE, "num_hidden_layers": 1, "num_experts": 3, "num_experts_per_tok": 2}
    config["quantization_config"] = CASES["gptq"][0]
    stored = write_checkpoint(tmp_path / "stored", config)
    plain = twin(stored, tmp_path / "plain", config, CASES["gptq"][1])
    want = logits(loaded(plain))
    torch.testing.assert_close(logits(loaded(stored)), want, rtol=0, atol=1e-5)
    model = loaded(stored, keep_quantized=True)
    assert model.layers[0].mlp.experts.gate_up_values.dtype == torch.int32
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["gptq", "gptq desc_act", "awq", "compressed-tensors, asymmetric"])
@torch.inference_mode()
def test_ranks(tmp_path: Path, case: str) -> None:
    """A rank's share may begin within a group, which is cut; widths that do not divide are padded.

    96 channels are 3 groups, for 2 and 4 ranks; heads of 32 are a group each."""
    config = {**ONE_LAYER, "quantization_config": CASES[case][0]}
    stored = write_checkpoint(tmp_path, config)
    whole = loaded(stored)
    x, inner = torch.randn(5, 64), torch.randn(5, 96)
    for count in (2, 4):
        ranks = [
            loaded(stored, keep_quantized=True, tp=TensorParallel(rank, count))
            for rank in range(count)
        ]
        mlps = [model.layers[0].mlp for model in ranks]
        gate_up = [mlp.gate_up_proj(x).chunk(2, 1) for mlp in mlps]
        shares = [mlp.tp.padded_share(96, 32 if count == 2 else 8)[:2] for mlp in mlps]
        want = whole.layers[0].mlp.gate_up_proj(x).chunk(2, 1)
        for i in range(2):
            taken = [part[i][:, : b - a] for part, (a, b) in zip(gate_up, shares, strict=True)]
            torch.testing.assert_close(torch.cat(taken, 1), want[i], rtol=1e-4, atol=1e-5)
        total = torch.zeros(5, 64)
        for mlp, (a, b) in zip(mlps, shares, strict=True):
            part = torch.zeros(5, mlp.down_proj.inputs)
            part[:, : b - a] = inner[:, a:b]
            total += mlp.down_proj(part)
        want = whole.layers[0].mlp.down_proj(inner)
        torch.testing.assert_close(total, want, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_every_part_of_a_model(tmp_path: Path) -> None:
    """A Qwen3.5: queries and gates by turns in one tensor, recurrent layers, a draft head."""
    config = {**config_json(UNIT_TEST), "quantization_config": gptq(group_size=16, desc_act=True)}
    stored = write_checkpoint(tmp_path / "stored", config)
    plain = twin(stored, tmp_path / "plain", config, obvious.gptq)
    model = loaded(stored, keep_quantized=True, mtp=True)
    assert any(isinstance(module, PartsLinear) for module in model.mtp.modules())
    torch.testing.assert_close(logits(model), logits(loaded(plain)), rtol=0, atol=1e-4)
    attention = model.layers[3].mixer
    x = torch.randn(3, 64)
    first = attention.queries_and_gates
    tail = attention.qkv_proj(x)[:, first:]
    torch.testing.assert_close(attention.qkv_proj.forward_from(first, x), tail)
