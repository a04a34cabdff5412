"""The shapes of Qwen3.5-27B-FP8 as a directory from which an engine can be built, and their work.

Only config.json is written; the weights are random with a seed (`load_format="dummy"`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from millrace.model.config import ModelConfig, read_config

COPY, FP8, BF16 = 4.27e12, 1300e12, 790e12  # rates of one H200, as measured: bytes/s and FLOP/s


def write_config(directory: Path, num_layers: int = 64) -> Path:
    """A flat text config of the published shapes, FP8 blocks included. Returns the directory."""
    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(num_layers)]
    config = {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": num_layers,
        "layer_types": kinds,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "vocab_size": 248320,
        "tie_word_embeddings": False,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "mtp_num_hidden_layers": 1,
        "eos_token_id": [248044, 248046],
        "dtype": "bfloat16",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
        },
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


@dataclass(frozen=True)
class Work:
    """What one step must compute and move, by part."""

    parts: dict[str, tuple[float, float, float]]  # FLOPs, their rate, bytes

    @property
    def flops(self) -> float:
        return sum(flops for flops, _, _ in self.parts.values())

    @property
    def bytes(self) -> float:
        return sum(moved for _, _, moved in self.parts.values())

    def floors(self) -> dict[str, float]:
        """Seconds that each part takes at best on one H200, and their sum."""
        found = {
            name: max(flops / rate, moved / COPY)
            for name, (flops, rate, moved) in self.parts.items()
        }
        return {**found, "all": sum(found.values())}


def read_sizes(directory: Path) -> ModelConfig:
    return read_config(directory)


def step_work(c: ModelConfig, rows: int, width: int, context: float, window: int = 16) -> Work:
    """A step of `rows` decoding rows of `width` tokens: FP8 products, heads, states, attention.

    Contexts are `context` tokens each, KV is FP8, states are float32; a row's window is half full
    and is folded every (window - width) / width steps.
    """
    tokens, h = rows * width, c.hidden_size
    kinds = c.layer_types
    gdn, full = kinds.count("linear_attention"), kinds.count("full_attention")
    mlp = 3 * h * c.intermediate_size
    attention = h * (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    attention += c.num_heads * c.head_dim * h
    values = c.value_heads * c.value_dim
    recurrent = h * (c.conv_channels + values) + values * h
    drafts = width - 1
    weights = gdn * (recurrent + mlp) + (full + min(drafts, 1)) * (attention + mlp)
    head = h * c.vocab_size
    state = rows * c.value_heads * c.key_dim * c.value_dim * 4.0
    folds = width / max(1, window - width)
    recent = rows * (c.key_heads * c.key_dim + values) * 4.0 * (window / 2 + width)
    kv = rows * context * 2 * c.num_kv_heads * c.head_dim * (full + min(drafts, 1))
    return Work(
        {
            "products": (2.0 * weights * tokens, FP8, weights + 4.0 * tokens * h * len(kinds)),
            "heads": (2.0 * head * (tokens + rows * drafts), BF16, 2.0 * head * (1 + drafts)),
            "states": (gdn * 8.0 * state / 4 * width, BF16, gdn * (state * (1 + folds) + recent)),
            "attention": (4.0 * kv / 2 / c.num_kv_heads * c.num_heads * width, BF16, 1.0 * kv),
        }
    )
