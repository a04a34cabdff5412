"""A family of models that is added without an edit anywhere else: the example of docs/extending.md.

Plain attention without norms of queries and keys, rotary embedding of half a head, and an MLP of
its own, squared ReLU without a gate. Its checkpoints have names of their own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from millrace.kernels.batch import Batch
from millrace.model.build_context import BuildContext
from millrace.model.config import ModelConfig
from millrace.model.config_file import ConfigFile
from millrace.model.family import Family
from millrace.model.layers.attention import Attention, Rope
from millrace.model.layers.decoder import Decoder, DecoderLayer
from millrace.model.layers.linear import linear, row_parallel
from millrace.model.layers.norm import NormedInput
from millrace.model.parameter import Piece
from millrace.model.weight_format import Linear

CONFIG = {
    "architectures": ["ToyForCausalLM"],
    "model_type": "toy",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "rope_theta": 10_000.0,
    "dtype": "float32",
}


class SquaredReLU(nn.Module):
    """down(relu(up(x)) ** 2)."""

    def __init__(self, build: BuildContext, prefix: str) -> None:
        super().__init__()
        hidden, width = build.config.hidden_size, build.config.intermediate_size
        up = Piece(f"{prefix}.up_proj.weight", (width, hidden), (build.tp.share(width),))
        self.up_proj = linear(build, [up])
        self.down_proj = row_parallel(build, f"{prefix}.down_proj.weight", hidden, width)

    @property
    def inputs(self) -> list[Linear]:
        return [self.up_proj]

    def forward(self, x: NormedInput, batch: Batch) -> Tensor:
        up = self.up_proj(x.for_linear(self.up_proj))
        out: Tensor = self.down_proj(torch.relu(up).square())
        return out


def read(file: ConfigFile) -> ModelConfig:
    file.only("attention_bias", False)
    return replace(file.decoder(rotary_share=0.5), norm_offset=1.0)


def build(context: BuildContext, max_len: int, mtp: bool) -> Decoder:
    rope = Rope(context, max_len)

    def layer(prefix: str) -> DecoderLayer:
        attention = Attention(context, f"{prefix}.self_attn", rope, qk_norm=False)
        return DecoderLayer(context, prefix, attention, SquaredReLU(context, f"{prefix}.mlp"))

    return Decoder(context, [layer(f"model.layers.{i}") for i in range(context.config.num_layers)])


def flat_name(name: str) -> str | None:
    """Checkpoints of this family call the model `toy`."""
    return name.replace("toy.", "model.", 1)


FAMILY = Family(
    name="Toy",
    model_types=("toy",),
    architectures=("ToyForCausalLM",),
    read=read,
    build=build,
    flat_name=flat_name,
)
