"""Checkpoints load completely, or are refused with every fault named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from millrace.errors import CheckpointError
from millrace.model import weights
from millrace.model.build import build_model
from millrace.model.causal_lm import CausalLM
from millrace.model.config import read_config
from millrace.model.families.qwen3_5 import flat_name
from millrace.model.parameter import pieces_of
from millrace.model.tiny import UNIT_TEST, TinyShape, write_checkpoint
from millrace.model.weights import expected_tensors, load, random_weights
from tests.model.test_config import CONFIG_27B_FP8

FP8, FLOAT = "e4m3", "float"


def published_27b() -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and kinds of the published 27B-FP8 checkpoint's text part, written out."""
    names: dict[str, tuple[tuple[int, ...], str]] = {}

    def fp8(name: str, out: int, width: int) -> None:
        names[f"{name}.weight"] = ((out, width), FP8)
        names[f"{name}.weight_scale_inv"] = ((-(-out // 128), -(-width // 128)), FLOAT)

    def plain(name: str, *shape: int) -> None:
        names[name] = (shape, FLOAT)

    def layer(prefix: str, attention: bool) -> None:
        plain(f"{prefix}.input_layernorm.weight", 5120)
        plain(f"{prefix}.post_attention_layernorm.weight", 5120)
        fp8(f"{prefix}.mlp.gate_proj", 17408, 5120)
        fp8(f"{prefix}.mlp.up_proj", 17408, 5120)
        fp8(f"{prefix}.mlp.down_proj", 5120, 17408)
        if attention:
            fp8(f"{prefix}.self_attn.q_proj", 12288, 5120)
            fp8(f"{prefix}.self_attn.k_proj", 1024, 5120)
            fp8(f"{prefix}.self_attn.v_proj", 1024, 5120)
            fp8(f"{prefix}.self_attn.o_proj", 5120, 6144)
            plain(f"{prefix}.self_attn.q_norm.weight", 256)
            plain(f"{prefix}.self_attn.k_norm.weight", 256)
            return
        fp8(f"{prefix}.linear_attn.in_proj_qkv", 10240, 5120)
        fp8(f"{prefix}.linear_attn.in_proj_z", 6144, 5120)
        plain(f"{prefix}.linear_attn.in_proj_a.weight", 48, 5120)
        plain(f"{prefix}.linear_attn.in_proj_b.weight", 48, 5120)
        plain(f"{prefix}.linear_attn.conv1d.weight", 10240, 1, 4)
        plain(f"{prefix}.linear_attn.A_log", 48)
        plain(f"{prefix}.linear_attn.dt_bias", 48)
        plain(f"{prefix}.linear_attn.norm.weight", 128)
        fp8(f"{prefix}.linear_attn.out_proj", 5120, 6144)

    plain("lm_head.weight", 248320, 5120)
    plain("model.language_model.embed_tokens.weight", 248320, 5120)
    plain("model.language_model.norm.weight", 5120)
    for i in range(64):
        layer(f"model.language_model.layers.{i}", attention=i % 4 == 3)
    plain("mtp.fc.weight", 5120, 10240)
    for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        plain(f"mtp.{norm}.weight", 5120)
    layer("mtp.layers.0", attention=True)
    return names


def model_27b(tmp_path: Path, kept: bool) -> CausalLM:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_27B_FP8))
    config = read_config(tmp_path)
    return build_model(
        config,
        dtype=torch.bfloat16,
        device="meta",
        max_len=16,
        mtp=True,
        keep_quantized=kept,
    )


def test_27b_names_and_shapes(tmp_path: Path) -> None:
    """Every published tensor is read, none is missing, and all have the expected shape."""
    model = model_27b(tmp_path, kept=True)
    expected = expected_tensors(model.config)
    spec = {flat_name(name): value for name, value in published_27b().items()}
    assert set(expected) == set(spec)
    for name, (shape, kind) in spec.items():
        assert name is not None
        assert expected[name].shape == shape, name
        assert ("F8_E4M3" in expected[name].dtypes) == (kind == FP8), name


@pytest.mark.parametrize("kept", [True, False])
def test_27b_rows_are_taken_once(tmp_path: Path, kept: bool) -> None:
    """On the meta device: the pieces of all parameters together are each tensor exactly once."""
    taken: dict[str, int] = {}
    for param in model_27b(tmp_path, kept).parameters():
        pieces = pieces_of(param)
        assert sum(piece.num_rows for piece in pieces) == param.shape[0]
        for piece in pieces:
            rows = {row for start, stop in piece.rows for row in range(start, stop)}
            assert len(rows) == piece.num_rows
            taken[piece.name] = taken.get(piece.name, 0) + len(rows)
    for name, (shape, kind) in published_27b().items():
        flat = flat_name(name)
        if flat is not None and (kept or not name.endswith("_scale_inv")):
            assert taken[flat] == shape[0], f"{name} ({kind})"


def test_27b_weight_bytes(tmp_path: Path) -> None:
    """29.95 GB of text and draft weights, as the checkpoint's files have."""
    params = model_27b(tmp_path, kept=True).parameters()
    total = sum(p.numel() * (2 if p.dtype == torch.float32 else p.itemsize) for p in params)
    assert abs(total / 1e9 - 29.95) < 0.01


# --- refusals ----------------------------------------------------------------------------------


def build(directory: Path, mtp: bool = True) -> CausalLM:
    return build_model(read_config(directory), dtype=torch.float32, mtp=mtp)


def rewrite(directory: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace tensors of a checkpoint, or take them out."""
    path = directory / "model.safetensors"
    tensors: dict[str, Tensor | None] = {**load_file(path), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(build(directory), directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, UNIT_TEST)
    rewrite(
        tmp_path,
        {
            "model.norm.weight": None,
            "mtp.fc.weight": None,
            "model.layers.9.mlp.up_proj.weight": torch.zeros(2, 3),
            "model.embed_tokens.weight": torch.zeros(5, 7),
            "model.layers.0.linear_attn.A_log": torch.zeros(4, dtype=torch.int64),
        },
    )
    message = refusal(tmp_path)
    for part in (
        "missing model.norm.weight",
        "missing mtp.fc.weight",
        "unexpected model.layers.9.mlp.up_proj.weight [2, 3]",
        "model.embed_tokens.weight has shape [5, 7], expected [320, 64]",
        "model.layers.0.linear_attn.A_log has dtype I64, expected BF16 or F16 or F32",
    ):
        assert part in message


def test_long_loads_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, UNIT_TEST)
    for every, logged in ((60.0, False), (-1.0, True)):
        monkeypatch.setattr(weights, "REPORT_EVERY", every)
        with caplog.at_level("INFO"):
            load(build(tmp_path), tmp_path)
        assert ("GiB of weights are loaded" in caplog.text) == logged


def test_missing_fp8_scale_is_named(tmp_path: Path) -> None:
    import dataclasses

    write_checkpoint(tmp_path, dataclasses.replace(UNIT_TEST, fp8=True))
    rewrite(tmp_path, {"model.layers.0.mlp.up_proj.weight_scale_inv": None})
    assert "missing model.layers.0.mlp.up_proj.weight_scale_inv" in refusal(tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, UNIT_TEST) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in refusal(tmp_path)


def test_other_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, UNIT_TEST)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    assert "model.safetensors" in refusal(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "no *.safetensors" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}')
    assert "gone is named" in refusal(tmp_path)
    for name in ("../../etc/passwd", "/etc/passwd", "sub/x.safetensors", "..", "", 7):
        index = json.dumps({"weight_map": {"a": name}})
        (tmp_path / "model.safetensors.index.json").write_text(index)
        assert "a shard is a file in the same directory" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "index.json" in refusal(tmp_path)


def test_what_may_be_there_unwanted(tmp_path: Path) -> None:
    """The draft head of a model run without it, a tied head, and the vision part."""
    write_checkpoint(tmp_path, UNIT_TEST)
    rewrite(
        tmp_path,
        {"lm_head.weight": torch.zeros(320, 64), "model.visual.patch.weight": torch.zeros(3)},
    )
    load(build(tmp_path, mtp=False), tmp_path)


# --- random weights ----------------------------------------------------------------------------


def test_random_weights(tmp_path: Path) -> None:
    """Seeded, of sane size, hardly a zero, in every dtype."""
    shape = TinyShape(
        hidden_size=128, intermediate_size=256, num_layers=4, head_dim=128, vocab_size=300, fp8=True
    )
    config = read_config(write_checkpoint(tmp_path, shape))
    models = [
        build_model(config, dtype=torch.bfloat16, mtp=True, keep_quantized=True) for _ in range(3)
    ]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        random_weights(model, seed)
    same, differ = True, False
    for a, b, c in zip(*(m.parameters() for m in models), strict=True):
        x, y, z = (t.float() for t in (a, b, c))
        same &= bool((x == y).all())
        differ |= bool((x != z).any())
        assert bool(x.isfinite().all())
        assert float((x == 0).float().mean()) < 0.01
    assert same
    assert differ
