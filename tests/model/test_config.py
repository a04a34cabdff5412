"""Configs of every published form are read; what is not supported is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from millrace.errors import CheckpointError
from millrace.model.config import ModelConfig, read_config
from millrace.model.tiny import TinyShape, config_json

# The published 27B: text part of its config.json, as far as it says something.
TEXT_27B: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 64,
    "full_attention_interval": 4,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 48,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "vocab_size": 248320,
    "max_position_embeddings": 262144,
    "mtp_num_hidden_layers": 1,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 248044,
    "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}
CONFIG_27B_FP8: dict[str, Any] = {
    "model_type": "qwen3_5",
    "tie_word_embeddings": False,
    "text_config": TEXT_27B,
    "vision_config": {"hidden_size": 1152, "depth": 27},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def read(directory: Path, config: dict[str, Any], generation: Any = None) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return read_config(directory)


def tiny_config(**changes: Any) -> dict[str, Any]:
    return {**config_json(TinyShape()), **changes}


def test_27b(tmp_path: Path) -> None:
    config = read(tmp_path, CONFIG_27B_FP8, {"eos_token_id": [248046, 248044]})
    assert config.quantization.method == "fp8"
    assert config.nested
    assert not config.tied
    assert (config.num_layers, config.num_attention_layers, config.num_gdn_layers) == (64, 16, 48)
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == list(
        range(3, 64, 4)
    )
    assert (config.rotary_dim, config.rope_theta, config.conv_channels) == (64, 1e7, 10240)
    assert config.eos_ids == (248046, 248044)


def test_nested_text_config_is_the_flat_one(tmp_path: Path) -> None:
    import dataclasses

    flat = read(tmp_path, TEXT_27B)
    nested = read(tmp_path, {**CONFIG_27B_FP8, "quantization_config": None})
    assert dataclasses.replace(nested, nested=False) == flat


def test_layers_that_are_not_quantized(tmp_path: Path) -> None:
    """Whole names, or parts of them between dots; those of a nested checkpoint are its own."""
    skipped = [
        "lm_head", "model.visual.merger", "model.language_model.layers.3.self_attn.k_proj",
        "layers.10", "mlp.gate",
    ]  # fmt: skip
    quantized = {**CONFIG_27B_FP8["quantization_config"], "modules_to_not_convert": skipped}
    found = read(tmp_path, {**CONFIG_27B_FP8, "quantization_config": quantized}).quantization
    names = {
        "lm_head": "plain",
        "model.layers.3.self_attn.k_proj": "plain",
        "model.layers.3.self_attn.q_proj": "FP8",
        "model.layers.10.mlp.up_proj": "plain",
        "model.layers.1.mlp.up_proj": "FP8",
        "model.layers.1.mlp.gate": "plain",
        "model.layers.1.mlp.gate_proj": "FP8",
    }
    assert {name: found.format_of(name).name for name in names} == names


def test_eos_falls_back_to_config(tmp_path: Path) -> None:
    assert read(tmp_path, TEXT_27B).eos_ids == (248044,)
    assert read(tmp_path, TEXT_27B, {"temperature": 1.0}).eos_ids == (248044,)


def test_older_rope_entries(tmp_path: Path) -> None:
    config = {k: v for k, v in TEXT_27B.items() if k != "rope_parameters"}
    config |= {"rope_theta": 5e5, "partial_rotary_factor": 0.5}
    assert (read(tmp_path, config).rope_theta, read(tmp_path, config).rotary_dim) == (5e5, 128)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"model_type": "qwen2_moe"}, "qwen2_moe"),
        ({"num_experts": 8}, "experts"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"linear_conv_kernel_dim": 3}, "linear_conv_kernel_dim"),
        ({"mtp_num_hidden_layers": 2}, "mtp_num_hidden_layers"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -5}, "-5"),
        ({"vocab_size": "many"}, "many"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 8}, "sliding_attention"),
        ({"rope_parameters": {}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "llama3"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "original_max"),
        ({"quantization_config": {"quant_method": "exl2"}}, "exl2"),
        ({"quantization_config": "fp8"}, "must be an object"),
        ({"architectures": "LlamaForCausalLM"}, "LlamaForCausalLM"),
        (
            {
                "quantization_config": {
                    "quant_method": "fp8",
                    "weight_block_size": [128, 128],
                    "modules_to_not_convert": "lm_head",
                }
            },
            "list of names",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            "64, 64",
        ),
    ],
)
def test_refusals_name_what_is_wrong(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, tiny_config(**changes))
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="object"):
        read_config(tmp_path)


def test_needs_no_torch() -> None:
    code = "import sys, millrace.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("nested", [True, False])
def test_entries_can_be_replaced(tmp_path: Path, nested: bool) -> None:
    config = CONFIG_27B_FP8 if nested else tiny_config()
    read(tmp_path, config)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
    changed = read_config(tmp_path, {"max_position_embeddings": 1010000, "rope_parameters": rope})
    assert changed.max_positions == 1010000
    assert changed.rope_scaling is not None
    assert changed.rope_scaling.factor == 4.0
    assert changed.rope_theta == read_config(tmp_path).rope_theta  # beside what was replaced
    inner = {"text_config": {"max_position_embeddings": 4095}}
    assert (read_config(tmp_path, inner).max_positions == 4095) is nested
