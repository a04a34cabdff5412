"""The shapes of the 27B model, and the device that everything lies on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEQUENCES = 256
VOCAB = 248320
HEADS, KV_HEADS, HEAD_DIM, PAGE = 24, 4, 256, 64
WINDOW = 16


@dataclass(frozen=True)
class Sizes:
    """What a dry run makes smaller."""

    hidden: int
    inter: int
    key_heads: int
    value_heads: int
    dim: int

    @property
    def keys(self) -> int:
        """Numbers that a token's keys are, of all heads of a GDN layer."""
        return self.key_heads * self.dim

    @property
    def values(self) -> int:
        """Numbers that its values are."""
        return self.value_heads * self.dim

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.keys + self.values

    @property
    def projected(self) -> int:
        """What the layer's first product makes: the channels, and a gate for each value."""
        return self.channels + self.values


FULL = Sizes(hidden=5120, inter=17408, key_heads=16, value_heads=48, dim=128)
SMALL = Sizes(hidden=1024, inter=256, key_heads=1, value_heads=2, dim=32)
