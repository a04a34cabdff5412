"""Makes the FP8 twin of a model directory: E4M3 weights with a scale for every 128 x 128 block.

    python models/mini/make_fp8.py models/millrace-mini models/millrace-mini-fp8
    python models/mini/make_fp8.py models/millrace-mini-moe millrace-mini-moe-fp8

The layout is that of the large FP8 checkpoints: each quantised `X.weight` has a bf16
`X.weight_scale_inv` that multiplies it, and experts have their tensors one by one; embeddings,
norms, routers, the GDN gates and convolution, and `mtp.fc` stay bf16.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from export import split_experts
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 128
QUANTISED = re.compile(
    r"\.(mlp\.((experts\.\d+|shared_expert)\.)?(gate|up|down)_proj|self_attn\.[qkvo]_proj"
    r"|linear_attn\.(in_proj_qkv|in_proj_z|out_proj))\.weight$"
)
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values and block scales (bf16) whose product is near the weight.

    The scale is rounded to bf16 first and the values are made for the rounded one, so that its
    rounding costs no accuracy. Dimensions must be multiples of 128.
    """
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    limit = torch.finfo(torch.float8_e4m3fn).max
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp(min=1e-12) / limit
    scale = scale.bfloat16()
    values = (blocks / scale.float()).clamp(-limit, limit).to(torch.float8_e4m3fn)
    return values.reshape(rows, columns), scale[:, 0, :, 0].contiguous()


def convert(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The quantised tensors, and the modules that were left as they are."""
    made: dict[str, Tensor] = {}
    kept = []
    for name, weight in weights.items():
        if QUANTISED.search(name):
            made[name], made[name.replace(".weight", ".weight_scale_inv")] = quantise(weight)
            continue
        made[name] = weight
        if weight.ndim > 1:
            kept.append(name.removesuffix(".weight"))
    return made, sorted([*kept, "lm_head"])


def make_twin(source: Path, target: Path) -> None:
    """The FP8 form of the model in `source`, in `target`, which is created."""
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(source / name, target / name)
    weights, kept = convert(split_experts(load_file(source / "model.safetensors")))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)
    size = (target / "model.safetensors").stat().st_size
    print(f"{target}: {len(weights)} tensors, {size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    make_twin(args.source, args.target)


if __name__ == "__main__":
    main()
