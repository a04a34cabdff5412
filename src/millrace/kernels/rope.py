"""Rotary position embedding of the first dimensions of a head, with YaRN for long contexts.

For text the three rows of interleaved mrope have equal positions, so mrope equals this 1-D form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from millrace.kernels.dispatch import op
from millrace.kernels.formats import YarnScaling


def rope_table(
    head_dim: int,
    rotary_dim: int,
    theta: float,
    max_len: int,
    scaling: YarnScaling | None,
    device: torch.device | str,
) -> Tensor:
    """The angles of every position: float32 [max_len, rotary_dim], cosines first, then sines."""
    if not 0 < rotary_dim <= head_dim:
        raise ValueError(f"rotary_dim must be in 1..{head_dim}, got {rotary_dim}")
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    frequency = 1.0 / theta**exponent
    magnitude = 1.0
    if scaling is not None:
        frequency = _yarn_frequency(frequency, rotary_dim, theta, scaling)
        magnitude = scaling.magnitude
    angle = torch.arange(max_len, dtype=torch.float32, device=device)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1) * magnitude


def _yarn_frequency(frequency: Tensor, dim: int, theta: float, scaling: YarnScaling) -> Tensor:
    """Scale the slow dimensions and keep the fast ones (YaRN, arXiv 2309.00071, section 3.2).

    A dimension that rotates more than beta_fast times over the original context is unchanged. One
    that rotates less than beta_slow times is divided by the factor. Those between are blended.
    """

    def dimension(turns: float) -> float:
        ratio = scaling.original_max_positions / (turns * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    index = torch.arange(dim // 2, dtype=torch.float32, device=frequency.device)
    slow = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency / scaling.factor * slow + frequency * (1 - slow)


@op
def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim dimensions of every head; the others are unchanged.

    x: [T, heads, head_dim]; positions: int64 [T]; cos_sin: a rope_table. Dimension i is
    rotated with i + rotary_dim / 2 ("rotate half"). Same shape and dtype as x.
    """
    rotary_dim = cos_sin.shape[-1]
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    left, right = x[..., :rotary_dim].float().chunk(2, dim=-1)
    turned = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), x[..., rotary_dim:]], dim=-1)
