"""Makes the model directory from a training run: config, generation config, bf16 weights.

    python models/mini/export.py OUT models/millrace-mini
    python models/mini/export.py --model millrace-mini-moe OUT models/millrace-mini-moe

OUT is train.py's. The tokenizer's files are make_tokenizer.py's and must be there already.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from model import SHAPES, Shape
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from train import load


def model_config(s: Shape, tokenizer: Tokenizer) -> dict[str, Any]:
    """The flat text config, as transformers and vLLM read it."""
    return {
        **mlp_config(s),
        "dtype": "bfloat16",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "layer_types": [
            "full_attention" if s.is_attention(i) else "linear_attention" for i in range(s.layers)
        ],
        "full_attention_interval": s.interval,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "attn_output_gate": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "linear_num_key_heads": s.key_heads,
        "linear_num_value_heads": s.value_heads,
        "linear_key_head_dim": s.gdn_dim,
        "linear_value_head_dim": s.gdn_dim,
        "linear_conv_kernel_dim": s.conv,
        "mamba_ssm_dtype": "float32",
        "hidden_act": "silu",
        "rms_norm_eps": s.eps,
        "partial_rotary_factor": s.rotary / s.head_dim,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": int(s.theta),
            "partial_rotary_factor": s.rotary / s.head_dim,
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
        },
        "max_position_embeddings": 4096,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }


def mlp_config(s: Shape) -> dict[str, Any]:
    """The family, and the sizes of its MLPs."""
    if not s.experts:
        return {
            "architectures": ["Qwen3_5ForCausalLM"],
            "model_type": "qwen3_5_text",
            "intermediate_size": s.intermediate,
        }
    return {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "num_experts": s.experts,
        "num_experts_per_tok": s.top_k,
        "moe_intermediate_size": s.intermediate,
        "shared_expert_intermediate_size": s.shared,
        "output_router_logits": False,
    }


def split_experts(weights: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """All experts one by one, in the tensors whose names begin with the prefix."""
    made: dict[str, Tensor] = {}
    for name, weight in weights.items():
        stem, _, last = name.rpartition(".")
        if not name.startswith(prefix) or not stem.endswith(".experts"):
            made[name] = weight
            continue
        parts = {last: weight}
        if last == "gate_up_proj":
            parts = dict(zip(("gate_proj", "up_proj"), weight.chunk(2, dim=1), strict=True))
        for part, of_all in parts.items():
            for expert, values in enumerate(of_all):
                made[f"{stem}.{expert}.{part}.weight"] = values.contiguous()
    return made


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_model(directory: Path, shape: Shape, weights: dict[str, Tensor]) -> None:
    """Config, generation config and bf16 weights, beside the tokenizer that is there."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    stops = [tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    write_json(directory / "config.json", model_config(shape, tokenizer))
    write_json(
        directory / "generation_config.json",
        {"do_sample": False, "eos_token_id": stops, "pad_token_id": stops[1]},
    )
    rounded = {
        name: value.to(torch.bfloat16).contiguous()
        for name, value in split_experts(weights, prefix="mtp.").items()
    }
    save_file(rounded, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"{directory}: {len(rounded)} tensors, {size / 1e6:.1f} MB in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="millrace-mini")
    parser.add_argument("run", type=Path, help="train.py's --out")
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    write_model(args.directory, SHAPES[args.model], load(args.run))


if __name__ == "__main__":
    main()
