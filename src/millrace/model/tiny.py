"""Writes a small Hugging Face checkpoint of random weights, for tests, demonstrations and set-up.

It knows the files of a checkpoint directory. The weights are seeded, so that the same call makes
the same model everywhere.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from millrace.model.config import read_config
from millrace.model.weights import expected_tensors

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The ids of <|im_end|> and <|endoftext|>: special tokens follow the 256 bytes.
STOPS = [256 + SPECIAL_TOKENS.index("<|im_end|>"), 256 + SPECIAL_TOKENS.index("<|endoftext|>")]
STOP_IDS = {"eos_token_id": STOPS[0], "bos_token_id": None, "pad_token_id": None}
# Dtypes of tensors that are not in the checkpoint's dtype, by their names in safetensors.
STORED = {
    "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TinyShape:
    """Sizes of a small model. The default has 8.9 million parameters and the head sizes of the
    27B."""

    hidden_size: int = 256
    intermediate_size: int = 640
    num_layers: int = 8
    layer_types: tuple[str, ...] | None = None
    num_heads: int = 2
    num_kv_heads: int = 2
    head_dim: int = 256
    key_heads: int = 2
    value_heads: int = 4
    key_dim: int = 128
    value_dim: int = 128
    vocab_size: int = 2048
    tied: bool = True
    mtp: bool = True
    fp8: bool = False
    dtype: str = "bfloat16"
    max_positions: int = 4096


UNIT_TEST = TinyShape(
    hidden_size=64,
    intermediate_size=96,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    key_dim=16,
    value_dim=16,
    vocab_size=320,
    dtype="float32",
)

# The config.json of a small Qwen3: change entries with `{**QWEN3, ...}`.
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "dtype": "float32",
}
# Small models with a mixture of experts.
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
}
QWEN3_MOE: dict[str, Any] = {
    **QWEN3,
    **EXPERTS,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
FP8_BLOCKS: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def write_checkpoint(
    directory: str | Path,
    shape: TinyShape | Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    nested: bool = False,
    fused: bool = False,
    files: int = 1,
    tokenizer: bool = True,
) -> Path:
    """Write config, weights and tokenizer into `directory`, which is created. Returns its path.

    shape: sizes of a Qwen3.5, or the entries of a config.json, of any family. nested: names and
    config of a checkpoint with a vision part. fused: the experts of a layer in one tensor, except
    in the draft head. files: number of safetensors files.
    """
    shape = shape or TinyShape()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = config_json(shape) if isinstance(shape, TinyShape) else {**STOP_IDS, **shape}
    if nested:
        config = _nest(config)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"eos_token_id": STOPS})
    tensors = random_tensors(directory, seed)
    if fused:
        tensors = fuse_experts(tensors)
    if nested:
        tensors = {_nested_name(name): tensor for name, tensor in tensors.items()}
    _write_weights(directory, tensors, files)
    if tokenizer:
        write_tokenizer(directory)
    return directory


def config_json(shape: TinyShape) -> dict[str, Any]:
    """The flat config.json of a model of this shape."""
    types = shape.layer_types or tuple(
        "full_attention" if i % 4 == 3 else "linear_attention" for i in range(shape.num_layers)
    )
    config: dict[str, Any] = {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": len(types),
        "layer_types": list(types),
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "linear_num_key_heads": shape.key_heads,
        "linear_num_value_heads": shape.value_heads,
        "linear_key_head_dim": shape.key_dim,
        "linear_value_head_dim": shape.value_dim,
        "linear_conv_kernel_dim": 4,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.max_positions,
        "rope_parameters": _rope(shape),
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "attn_output_gate": True,
        "mtp_num_hidden_layers": int(shape.mtp),
        "dtype": shape.dtype,
        **STOP_IDS,
    }
    if shape.fp8:
        config["quantization_config"] = FP8_BLOCKS
    return config


def moe_config_json(shape: TinyShape = UNIT_TEST) -> dict[str, Any]:
    """The flat config.json of a Qwen3.5 of this shape with a mixture of experts."""
    config = config_json(shape)
    del config["intermediate_size"]
    return {
        **config,
        **EXPERTS,
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "shared_expert_intermediate_size": 48,
    }


def _rope(shape: TinyShape) -> dict[str, Any]:
    pairs = shape.head_dim // 8  # rotated pairs of dimensions, a quarter of the head's
    side = pairs // 3
    return {
        "rope_type": "default",
        "rope_theta": 10_000_000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [pairs - 2 * side, side, side],
        "mrope_interleaved": True,
    }


def random_tensors(directory: str | Path, seed: int) -> dict[str, Tensor]:
    """Seeded weights by flat name, for the config.json in `directory`."""
    config = read_config(directory)
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    tensors = {}
    for name, spec in expected_tensors(config).items():
        fp32 = name.endswith(("A_log", "dt_bias"))
        of_format = [STORED[known] for known in spec.dtypes if known in STORED]
        tensor = torch.empty(spec.shape, dtype=[*of_format, torch.float32 if fp32 else dtype][0])
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        spec.init(tensor, generator)
        tensors[name] = tensor
    return tensors


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of bytes and special tokens, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": CHAT_TEMPLATE,
            "eos_token": SPECIAL_TOKENS[2],
            "pad_token": SPECIAL_TOKENS[0],
            "clean_up_tokenization_spaces": False,
        },
    )


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    outer = {
        "architectures": [
            name.replace("CausalLM", "ConditionalGeneration") for name in flat["architectures"]
        ],
        "model_type": flat["model_type"].removesuffix("_text"),
        "tie_word_embeddings": flat["tie_word_embeddings"],
        "text_config": {k: v for k, v in flat.items() if k != "quantization_config"},
    }
    if "quantization_config" in flat:
        outer["quantization_config"] = flat["quantization_config"]
    return outer


def fuse_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with the experts of each layer in two, draft head excepted."""
    found: dict[str, Tensor] = {}
    gathered: dict[str, list[list[Tensor]]] = {}
    for name, tensor in tensors.items():
        stem, experts, rest = name.partition(".experts.")
        if not experts or name.startswith("mtp."):
            found[name] = tensor
            continue
        expert, _, part = rest.partition(".")
        linear, _, kind = part.partition(".")
        suffix = kind.removeprefix("weight")
        both = "down_proj" if linear == "down_proj" else "gate_up_proj"
        lists = gathered.setdefault(f"{stem}.experts.{both}{suffix}", [])
        if int(expert) == len(lists):
            lists.append([])
        lists[int(expert)].append(tensor)
    for name, lists in gathered.items():
        found[name] = torch.stack([torch.cat(parts) for parts in lists])
    return found


def _nested_name(name: str) -> str:
    if name.startswith("model."):
        return "model.language_model." + name.removeprefix("model.")
    return name


def _write_weights(directory: Path, tensors: dict[str, Tensor], files: int) -> None:
    if files == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for index in range(files):
        file = f"model-{index + 1:05}-of-{files:05}.safetensors"
        part = names[index::files]
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    _write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


SHAPES: dict[str, TinyShape | dict[str, Any]] = {
    "qwen3_5": TinyShape(),
    "qwen3": {
        **QWEN3, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 8,
        "head_dim": 128, "vocab_size": 2048, "dtype": "bfloat16",
    },
    "qwen3_moe": {
        **QWEN3_MOE, "hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 8,
        "num_experts": 32, "num_experts_per_tok": 4, "head_dim": 128, "vocab_size": 2048,
        "dtype": "bfloat16",
    },
    "qwen3_5_moe": {
        **moe_config_json(TinyShape()), "moe_intermediate_size": 128, "num_experts": 32,
        "num_experts_per_tok": 4, "shared_expert_intermediate_size": 128,
    },
}  # fmt: skip


def main() -> None:
    """Write a small checkpoint of random weights into DIRECTORY."""
    parser = argparse.ArgumentParser(prog="millrace.model.tiny", description=main.__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--family", choices=SHAPES, default="qwen3_5", help="of the model")
    options = parser.parse_args()
    print(write_checkpoint(options.directory, SHAPES[options.family], seed=options.seed))


if __name__ == "__main__":
    main()
