"""Small EAGLE3 drafters of random weights, as files, and what they compute, written plainly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

EAGLE3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "draft_vocab_size": 200,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "dtype": "float32",
}


def tensors(config: dict[str, Any], seed: int, *, embedding: bool, qk_norm: bool) -> Any:
    """Random weights by flat name."""
    generator = torch.Generator().manual_seed(seed)
    rows, vocab, hidden = config["draft_vocab_size"], config["vocab_size"], config["hidden_size"]
    width, dim = config["intermediate_size"], config["head_dim"]
    queries, keys = (config[f"num_{name}_heads"] * dim for name in ("attention", "key_value"))

    def matrix(out: int, inputs: int) -> Tensor:
        return torch.randn(out, inputs, generator=generator) / inputs**0.5

    def near_one(size: int) -> Tensor:
        return 1 + 0.1 * torch.randn(size, generator=generator)

    found = {
        "fc.weight": matrix(hidden, 3 * hidden),
        "midlayer.input_layernorm.weight": near_one(hidden),
        "midlayer.hidden_norm.weight": near_one(hidden),
        "midlayer.post_attention_layernorm.weight": near_one(hidden),
        "midlayer.self_attn.q_proj.weight": matrix(queries, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": matrix(keys, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": matrix(keys, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": matrix(hidden, queries),
        "midlayer.mlp.gate_proj.weight": matrix(width, hidden),
        "midlayer.mlp.up_proj.weight": matrix(width, hidden),
        "midlayer.mlp.down_proj.weight": matrix(hidden, width),
        "norm.weight": near_one(hidden),
        "lm_head.weight": matrix(rows, hidden),
    }
    if rows < vocab:
        ids = torch.randperm(vocab, generator=generator)[:rows].sort().values
        found["d2t"] = ids - torch.arange(rows)
        found["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill_(0, ids, True)
    if embedding:
        found["embed_tokens.weight"] = matrix(vocab, hidden)
    if qk_norm:
        for name in "qk":
            found[f"midlayer.self_attn.{name}_norm.weight"] = near_one(dim)
    for name, size in (("input_norm", 3 * hidden), ("fc_norm", hidden)):
        if config.get(name):
            found[f"{name}.weight"] = near_one(size)
    return found


def write_eagle3(
    directory: Path, *, seed: int = 5, embedding: bool = False, qk_norm: bool = False,
    layer: str = "midlayer.", prefix: str = "", **changes: Any,
) -> tuple[Path, Reference]:  # fmt: skip
    """A drafter's files, and its twin. layer, prefix: what names begin with. changes: of
    config.json; input_norm, fc_norm: with these norms."""
    config = {**EAGLE3, **changes}
    weights = tensors(config, seed, embedding=embedding, qk_norm=qk_norm)
    directory.mkdir(parents=True)
    named = {
        prefix + name.replace("midlayer.", layer): tensor.contiguous()
        for name, tensor in weights.items()
    }
    save_file(named, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory, Reference(config, weights)


@dataclass
class Reference:
    """EAGLE3 from its definition, in float32, over a whole sequence at once."""

    config: dict[str, Any]
    weights: dict[str, Tensor]

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def fuse(self, streams: Tensor) -> Tensor:
        """streams: [T, 3 H]."""
        x = self.norm(streams, "input_norm") if self.config.get("input_norm") else streams
        x = self.linear(x, "fc")
        return self.norm(x, "fc_norm") if self.config.get("fc_norm") else x

    def drafts(self, tokens: list[int], streams: Tensor, embed: Tensor, count: int) -> list[Tensor]:
        """Logits [V] of each draft behind `tokens`, if the best tokens are drafted. streams:
        [T - 1, 3 H], of all tokens but the last. embed: [V, H], the target's."""
        embed = self.weights.get("embed_tokens.weight", embed)
        features, ids, found = self.fuse(streams), list(tokens), []
        for _ in range(count):
            out, last = self.layer(embed[torch.tensor(ids[1:])], features)
            logits = torch.full((self.config["vocab_size"],), -torch.inf)
            rows = torch.arange(self.config["draft_vocab_size"])
            logits[rows + self.weights.get("d2t", 0)] = last @ self.weights["lm_head.weight"].T
            found.append(logits)
            ids.append(int(logits.argmax()))
            features = torch.cat([features, out[None]])
        return found

    def layer(self, embedded: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """What the next draft takes, and what the output head reads: [H] each, at the last token.
        Token i reads feature i - 1."""
        normed = self.norm(features, "midlayer.hidden_norm")
        residual = normed if self.config.get("norm_before_residual") else features
        x = torch.cat([self.norm(embedded, "midlayer.input_layernorm"), normed], -1)
        x = residual + self.attention(x)
        hidden = self.norm(x, "midlayer.post_attention_layernorm")
        gate, up = (self.linear(hidden, f"midlayer.mlp.{name}_proj") for name in ("gate", "up"))
        x = x + self.linear(torch.nn.functional.silu(gate) * up, "midlayer.mlp.down_proj")
        last = self.norm(x, "norm")[-1]
        return (last if self.config.get("norm_output") else x[-1]), last

    def attention(self, x: Tensor) -> Tensor:
        dim = self.config["head_dim"]
        group = self.config["num_attention_heads"] // self.config["num_key_value_heads"]

        def heads(name: str) -> Tensor:
            made = self.linear(x, f"midlayer.self_attn.{name}_proj").unflatten(-1, (-1, dim))
            if f"midlayer.self_attn.{name}_norm.weight" in self.weights:
                made = self.norm(made, f"midlayer.self_attn.{name}_norm")
            return made if name == "v" else rotated(made)

        q, k, v = (heads(name).transpose(0, 1) for name in "qkv")
        k, v = (part.repeat_interleave(group, 0) for part in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.linear(out.transpose(0, 1).flatten(1), "midlayer.self_attn.o_proj")


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding of [T, heads, dim], by halves."""
    dim = x.shape[-1]
    angle = torch.arange(x.shape[0])[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., : dim // 2], x[..., dim // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
