"""The shapes of published models as directories from which engines can be built, and their work.

Only config.json is written; the weights are random with a seed (`load_format="dummy"`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import exp
from pathlib import Path
from statistics import NormalDist
from typing import Any

from millrace.model.config import ModelConfig, read_config

COPY, FP8, BF16 = 4.27e12, 1300e12, 790e12  # rates of one H200, as measured: bytes/s and FLOP/s
ROUTER_SPREAD = 0.25  # deviation of the logarithms of lengths of a router's rows
FP8_BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
# 4 bits in groups of 128, symmetric, as most checkpoints of this class are.
INT4_GROUPS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                "group_size": 128,
            },
        }
    },
    "ignore": ["lm_head"],
}  # fmt: skip
QUANTIZATIONS: dict[str, dict[str, Any]] = {"fp8": FP8_BLOCKS, "int4": INT4_GROUPS}
INT4_BYTES = 0.5 + 2 / 128  # of a weight, with its part of a scale
QWEN3_5_27B: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
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
    "eos_token_id": [248044, 248046],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}
QWEN3_32B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "eos_token_id": [151645, 151643],
    "rope_theta": 1e6,
}


def _qwen3_5_moe(
    hidden: int, layers: int, heads: int, values: int, experts: int, top_k: int, width: int
) -> dict[str, Any]:
    """values: value heads of GDN layers; width: of an expert, the shared one included."""
    return QWEN3_5_27B | {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "linear_num_value_heads": values,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3.5-27b": QWEN3_5_27B,
    "qwen3-32b": QWEN3_32B,
    "qwen3-8b": QWEN3_32B
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "qwen3.5-35b-a3b": _qwen3_5_moe(2048, 40, 16, 32, 256, 8, 512),
    "qwen3.5-122b-a10b": _qwen3_5_moe(3072, 48, 32, 64, 256, 8, 1024),
    "qwen3.5-397b-a17b": _qwen3_5_moe(4096, 60, 32, 64, 512, 10, 1024),
    "qwen3-next-80b-a3b": _qwen3_5_moe(2048, 48, 16, 32, 512, 10, 512)
    | {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "vocab_size": 151936,
        "eos_token_id": [151645, 151643],
    },
    "qwen3-coder-30b-a3b": QWEN3_32B
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 262144,
        "rope_theta": 1e7,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
}


def write_config(
    directory: Path,
    layers: int | None = None,
    name: str = "qwen3.5-27b",
    quantization: str = "fp8",
) -> Path:
    """The config.json of a model of SHAPES with quantized weights. layers: None: all. Returns the
    directory."""
    config = SHAPES[name] | {
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "quantization_config": QUANTIZATIONS[quantization],
    }
    if layers is not None:
        config["num_hidden_layers"] = layers
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


def expert_shares(c: ModelConfig) -> list[float]:
    """The share of tokens that each expert of a layer gets, the busiest last.

    Rows of the router have lengths exp(ROUTER_SPREAD * normal), so the logits of an expert are
    normal with that deviation; an expert gets a token if its logit exceeds a threshold, at which
    `top_k` of them do on average.
    """
    assert c.experts is not None
    normal, count = NormalDist(), c.experts.count
    scales = [exp(ROUTER_SPREAD * normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        found = sum(1 - normal.cdf(middle / scale) for scale in scales)
        low, high = (middle, high) if found > c.experts.top_k else (low, middle)
    return [1 - normal.cdf(low / scale) for scale in scales]


def experts_hit(c: ModelConfig, tokens: float) -> float:
    """Experts of a layer that get one of so many tokens."""
    return sum(1 - (1 - share) ** tokens for share in expert_shares(c))


def mlp_weights(c: ModelConfig, tokens: float) -> float:
    """Weights of the MLP of a layer that so many tokens read; of one token: those that it is
    multiplied with. Models with experts are taken to have them in every layer."""
    if c.experts is None:
        return 3.0 * c.hidden_size * c.intermediate_size
    widths = experts_hit(c, tokens) * c.experts.width + c.experts.shared_width
    return c.hidden_size * (3 * widths + c.experts.count + bool(c.experts.shared_width))


def gemm_weights(c: ModelConfig, tokens: float = 1) -> tuple[float, float, int]:
    """Weights of the linear layers of one layer that so many tokens read: GDN with its MLP,
    attention with its MLP; and of the output head."""
    h, values = c.hidden_size, c.value_heads * c.value_dim
    queries = 2 if c.num_gdn_layers else 1  # hybrid models have output gates
    mlp = mlp_weights(c, tokens)
    attention = h * (queries * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    attention += c.num_heads * c.head_dim * h
    recurrent = h * (c.conv_channels + values) + values * h
    return recurrent + mlp, attention + mlp, h * c.vocab_size


def step_work(c: ModelConfig, rows: int, width: int, context: float, window: int = 16) -> Work:
    """A step of `rows` decoding rows of `width` tokens: FP8 products, heads, states, attention.

    Contexts are `context` tokens each, KV is FP8, states are float32; a row's window is half full
    and is folded every (window - width) / width steps.
    """
    tokens, h = rows * width, c.hidden_size
    gdn, full = c.num_gdn_layers, c.num_attention_layers
    values = c.value_heads * c.value_dim
    drafts = width - 1
    recurrent, attention, head = gemm_weights(c)
    weights = gdn * recurrent + (full + min(drafts, 1)) * attention
    recurrent, attention, _ = gemm_weights(c, tokens)
    read = gdn * recurrent + (full + min(drafts, 1)) * attention
    size, rate = _of_weights(c)
    state = rows * c.value_heads * c.key_dim * c.value_dim * 4.0
    folds = width / max(1, window - width)
    recent = rows * (c.key_heads * c.key_dim + values) * 4.0 * (window / 2 + width)
    kv = rows * context * 2 * c.num_kv_heads * c.head_dim * (full + min(drafts, 1))
    return Work(
        {
            "products": (
                2.0 * weights * tokens,
                rate,
                size * read + 4.0 * tokens * h * c.num_layers,
            ),
            "heads": (2.0 * head * (tokens + rows * drafts), BF16, 2.0 * head * (1 + drafts)),
            "states": (gdn * 8.0 * state / 4 * width, BF16, gdn * (state * (1 + folds) + recent)),
            "attention": (4.0 * kv / 2 / c.num_kv_heads * c.num_heads * width, BF16, 1.0 * kv),
        }
    )


def _of_weights(c: ModelConfig) -> tuple[float, float]:
    """Bytes of a weight of a linear layer, and the rate of their products."""
    if c.quantization.method == "compressed-tensors":
        return INT4_BYTES, BF16
    return 1.0, FP8


def prefill_work(c: ModelConfig, prompts: int, length: int) -> Work:
    """Whole prompts of `length` tokens: FP8 products and attention, of which half is masked.

    The recurrence of GDN layers and the few rows of the output head are left out.
    """
    tokens = prompts * length
    recurrent, attention, _ = gemm_weights(c)
    weights = c.num_gdn_layers * recurrent + c.num_attention_layers * attention
    recurrent, attention, _ = gemm_weights(c, tokens)
    read = c.num_gdn_layers * recurrent + c.num_attention_layers * attention
    pairs = prompts * length * (length + 1) / 2
    scores = 4.0 * pairs * c.num_heads * c.head_dim * c.num_attention_layers
    size, rate = _of_weights(c)
    moved = size * read + 4.0 * tokens * c.hidden_size * c.num_layers
    return Work(
        {"products": (2.0 * weights * tokens, rate, moved), "attention": (scores, BF16, 0.0)}
    )
